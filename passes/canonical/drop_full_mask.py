"""Drop attention masks that hide nothing, whatever the input: models that can mask write one down always.

attention(q, k, v, arange(n) ≥ 0)   ⇒   attention(q, k, v)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphq.graph.optable import family_of
from graphq.graph.view import LayerView, parameter, value_of

LARGEST = 2**22  # elements of a mask that are worth computing


def drop_full_masks(gm: fx.GraphModule) -> int:
    """Drop, in place, masks that follow from constants and are True (or zero) everywhere."""
    dropped = 0
    for node in gm.graph.nodes:
        if family_of(node.target) != "attention":
            continue
        view = LayerView(gm, node)
        mask, query = view.arg("attn_mask"), view.arg("query")
        if not isinstance(mask, fx.Node) or str(value_of(node).shape[:-1]) != str(value_of(query).shape[:-1]):
            continue
        hides = _constant(gm, mask)
        if hides is not None and bool(hides.all() if hides.dtype == torch.bool else (hides == 0).all()):
            node.args = tuple(None if a is mask else a for a in node.args)
            node.kwargs = {k: v for k, v in node.kwargs.items() if v is not mask}
            dropped += 1
    gm.graph.eliminate_dead_code()
    return dropped


def _constant(gm: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """The values of a tensor that depends on no input, up to repetition along axes; None for others."""
    known = parameter(gm, node)
    if known is not None:
        return known
    example, op = value_of(node), node.target
    if not isinstance(op, OpOverload) or not isinstance(example, Tensor):
        return None
    if family_of(op) == "expand":
        return _constant(gm, node.args[0])  # type: ignore[arg-type]
    varies = op._schema.is_mutable or torch.Tag.nondeterministic_seeded in op.tags
    if varies or not all(isinstance(d, int) for d in example.shape) or example.numel() > LARGEST:
        return None
    values = {source: _constant(gm, source) for source in node.all_input_nodes}
    if any(v is None for v in values.values()):
        return None

    def value(source: fx.Node) -> Any:
        return values[source]

    result = op(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    return result if isinstance(result, Tensor) else None
