"""Turn in-place ops on intermediate tensors into their functional forms, without tracing the graph again."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphq.graph.view import value_of


def mutates(node: fx.Node) -> bool:
    """Does the op write to one of its inputs? (Batch norm in eval mode only says so.)"""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and "batch_norm" not in schema.name


def functionalize(gm: fx.GraphModule) -> bool:
    """x.add_(y) ⇒ x.add(y), read from there on. Returns False, with the graph partly changed, at the first op for
    which that is not plainly right: what it writes to may be seen through another name."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in list(gm.graph.nodes):
        if not mutates(node):
            continue
        functional = _functional(node)
        written = node.args[0] if node.args else None
        if functional is None or not isinstance(written, fx.Node) or not _owns_its_memory(written):
            return False
        earlier = [u for u in written.users if order[u] < order[node]]
        if not all(_owns_its_memory(u) for u in earlier):
            return False
        node.target = functional
        written.replace_all_uses_with(node, delete_user_cb=lambda u, node=node: order[u] > order[node])  # type: ignore[misc]
    gm.recompile()
    return True


def _functional(node: fx.Node) -> OpOverload | None:
    """The op of the same name without the underscore, if it gives the same: no type is promoted."""
    assert isinstance(node.target, OpOverload)
    name = node.target._schema.name.removeprefix("aten::")
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = node.target._overloadname or "default"
    values = [value_of(a) for a in node.all_input_nodes]
    same_type = len({v.dtype for v in values if isinstance(v, Tensor)}) == 1
    return getattr(packet, overload, None) if packet is not None and same_type else None


def _owns_its_memory(node: fx.Node) -> bool:
    """Is the result a new tensor? Views say that they are not; dropout returns its input in eval mode."""
    if node.op == "output":
        return True
    if not isinstance(node.target, OpOverload) or "dropout" in node.target._schema.name:
        return False
    return all(r.alias_info is None for r in node.target._schema.returns)
