"""Write attention out as products and softmax.

    attention(q, k, v, mask)   ⇒   softmax(q·kᵀ · scale + mask) · v,  times 0 in rows where all is masked

Before quantizers are placed, so that each of its ops can run on integers (`take_apart`); the scale is on the query
then, since nothing may stand between the products and the softmax. Before export, so that an exporter does not guard
every probability against NaN (`write_out_attention`).

torch gives zeros for a query that sees no key; exporters write that as a test of all probabilities [n, heads, length,
length], which takes as long as the products. Here what is masked gets the lowest float, not -inf, so that nothing
becomes NaN, and the rows [n, 1, length, 1] that see nothing are set to zero in the result.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import fx

from graphq.graph.infer import infer
from graphq.graph.optable import family_of
from graphq.graph.view import PART_OF, LayerView, parameter, value_of

aten = torch.ops.aten
LOWEST = torch.finfo(torch.float32).min
Mask = tuple[fx.Node | None, fx.Node | None]  # what is added to the scores; 1 for queries that see a key, 0 for others


def write_out_attention(gm: fx.GraphModule) -> None:
    """Rewrite, in place, every attention with a mask that is not causal by a flag."""
    masks: dict[fx.Node, Mask] = {}
    for view in map(partial(LayerView, gm), list(gm.graph.nodes)):
        mask = view.arg("attn_mask") if is_plain_attention(view) else None
        if isinstance(mask, fx.Node):
            if mask not in masks:
                masks[mask] = _mask(gm, mask)
            _write_out(gm, view, masks[mask])
    gm.graph.eliminate_dead_code()


def take_apart(gm: fx.GraphModule, attentions: list[LayerView]) -> None:
    """Rewrite, in place, these attentions, with the scale on the query; rules on attention hold for the parts."""
    masks: dict[Any, Mask] = {None: (None, None)}
    for view in attentions:
        mask = view.arg("attn_mask")
        if mask not in masks:
            masks[mask] = _mask(gm, mask)
        _write_out(gm, view, masks[mask], scale_query=True)
    gm.graph.eliminate_dead_code()


def is_plain_attention(view: LayerView) -> bool:
    """Is it an attention in float32 that no flag makes causal, groups or drops?"""
    if family_of(view.node.target) != "attention" or view.dtype != torch.float32:
        return False
    return not any(view.arg(flag) for flag in ("is_causal", "enable_gqa", "dropout_p"))


def _write_out(gm: fx.GraphModule, view: LayerView, mask: Mask, *, scale_query: bool = False) -> None:
    node = view.node
    query, key, value, scale = (view.arg(k) for k in ("query", "key", "value", "scale"))
    added, sees = mask
    factor = 1 / math.sqrt(value_of(query).shape[-1]) if scale is None else scale
    before = node.prev
    with gm.graph.inserting_before(node):
        if scale_query:
            query = _call(gm, aten.mul.Tensor, query, factor)
        scores = _call(gm, aten.matmul.default, query, _call(gm, aten.transpose.int, key, -2, -1))
        if not scale_query:
            scores = _call(gm, aten.mul.Tensor, scores, factor)
        if added is not None:
            scores = _call(gm, aten.add.Tensor, scores, added)
        result = _call(gm, aten.matmul.default, _call(gm, aten.softmax.int, scores, -1), value)
        if sees is not None:
            result = _call(gm, aten.mul.Tensor, result, sees)
    result.meta = dict(node.meta)
    while scale_query and before.next is not node:
        before = before.next
        before.meta |= {"nn_module_stack": node.meta.get("nn_module_stack"), PART_OF: "attention"}
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
