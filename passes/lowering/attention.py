"""Write attention out, so that an exporter does not guard every probability against NaN.

    attention(q, k, v, mask)   ⇒   softmax(q·kᵀ · scale + mask) · v,  times 0 in rows where all is masked

torch gives zeros for a query that sees no key; exporters write that as a test of all probabilities [n, heads, length,
length], which takes as long as the products. Here what is masked gets the lowest float, not -inf, so that nothing
becomes NaN, and the rows [n, 1, length, 1] that see nothing are set to zero in the result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphq.graph.infer import infer
from graphq.graph.optable import family_of
from graphq.graph.view import LayerView, parameter, value_of

aten = torch.ops.aten
LOWEST = torch.finfo(torch.float32).min
Mask = tuple[fx.Node, fx.Node | None]  # what is added to the scores; 1 for queries that see a key, 0 for others


def write_out_attention(gm: fx.GraphModule) -> None:
    """Rewrite, in place, every attention with a mask that is not causal by a flag."""
    masks: dict[fx.Node, Mask] = {}
    for node in list(gm.graph.nodes):
        if family_of(node.target) == "attention":
            view = LayerView(gm, node)
            mask = view.arg("attn_mask")
            plain = not view.arg("is_causal") and not view.arg("enable_gqa") and not view.arg("dropout_p")
            if plain and isinstance(mask, fx.Node) and value_of(node).dtype == torch.float32:
                _write_out(gm, node, view, mask, masks)
    gm.graph.eliminate_dead_code()


def _write_out(gm: fx.GraphModule, node: fx.Node, view: LayerView, mask: fx.Node, masks: dict[fx.Node, Mask]) -> None:
    query, key, value, scale = (view.arg(k) for k in ("query", "key", "value", "scale"))
    if mask not in masks:
        masks[mask] = _mask(gm, mask)
    added, sees = masks[mask]
    factor = 1 / math.sqrt(value_of(query).shape[-1]) if scale is None else scale
    with gm.graph.inserting_before(node):
        scores = _call(gm, aten.matmul.default, query, _call(gm, aten.transpose.int, key, -2, -1))
        scores = _call(gm, aten.add.Tensor, _call(gm, aten.mul.Tensor, scores, factor), added)
        result = _call(gm, aten.matmul.default, _call(gm, aten.softmax.int, scores, -1), value)
        if sees is not None:
            result = _call(gm, aten.mul.Tensor, result, sees)
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)


def _mask(gm: fx.GraphModule, mask: fx.Node) -> Mask:
    """Right behind the node that makes the mask, for all that read it."""
    known = parameter(gm, mask)
    if known is not None and known.is_floating_point() and bool(torch.isfinite(known).all()):
        return mask, None
    after = mask if mask.op != "placeholder" else next(n for n in reversed(gm.graph.nodes) if n.op == "placeholder")
    with gm.graph.inserting_before(after.next):
        if value_of(mask).dtype == torch.bool:
            visible = mask
            added = _call(gm, aten.where.Scalar, mask, 0.0, LOWEST)
        else:
            visible = _call(gm, aten.gt.Scalar, mask, -math.inf)
            lowered = _call(gm, aten.clamp.default, mask, LOWEST / 2)  # the lowest float is more than -inf
            added = _call(gm, aten.where.ScalarOther, visible, lowered, LOWEST)
        seen = _call(gm, aten.any.dim, visible, -1, True)
        sees = _call(gm, aten.to.dtype, seen, torch.float32)
    return added, sees


def _call(gm: fx.GraphModule, target: Any, *args: Any) -> fx.Node:
    node = gm.graph.call_function(target, args)
    node.meta["val"] = infer(node)
    return node
