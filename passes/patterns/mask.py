"""Additive masks: tensors that hold -inf (or the lowest float) where attention must not look. Never quantized."""

from torch import Tensor, fx

from graphq.graph.optable import family_of

_MOVES = frozenset({"expand", "reshape", "transpose", "slice", "cast", "identity", "add", "mul"})
_LOWEST = -1e4


def is_mask(node: fx.Node, depth: int = 12) -> bool:
    """Is this tensor made by filling -inf or the lowest float under a condition?"""
    name = str(node.target).removeprefix("aten.").partition(".")[0]
    if name in ("where", "masked_fill", "masked_fill_"):
        return any(_is_lowest(a) for a in node.args[1:])
    if name in ("full", "full_like", "scalar_tensor"):
        return any(_is_lowest(a) for a in node.args)
    if depth and family_of(node.target) in _MOVES:
        return any(is_mask(a, depth - 1) for a in node.all_input_nodes)
    return False


def _is_lowest(value: object) -> bool:
    if isinstance(value, int | float):
        return value <= _LOWEST
    if isinstance(value, fx.Node):
        constant = value.meta.get("val")
        if isinstance(constant, Tensor) and value.op == "get_attr" and constant.numel() == 1:
            return False
        return is_mask(value, 4)
    return False
