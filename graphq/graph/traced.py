"""A pattern traced from a module or a function: what the user's own block becomes in a graph.

Inputs and parameters become captures, by their names; numbers and attributes must be the same. Sizes that follow from
shapes (of view, expand) are left free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphq.errors import PassError
from graphq.graph.capture import capture
from graphq.graph.optable import COMMUTATIVE, FAMILIES, family_of, overloads
from graphq.graph.pattern import SCALED, Call, Capture, Expr, Param, Pattern

SHAPED = frozenset({"reshape", "expand"})  # families whose arguments after the first are sizes


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def traced(
    model: nn.Module | Callable[..., Any],
    *inputs: Tensor,
    canonicalize: Callable[[fx.GraphModule], Any] = lambda gm: None,
) -> Pattern:
    """The pattern of a module or function on example inputs. Raises CaptureError if it cannot be traced.

    canonicalize: the passes that the graphs in which it is looked for have been through.
    """
    module = model if isinstance(model, nn.Module) else _Function(model)
    gm = capture(module, inputs, dynamic_shapes=None)
    canonicalize(gm)
    made: dict[fx.Node, Expr] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            made[node] = Capture(_name(node.name))
        elif node.op == "get_attr":
            made[node] = Param(Capture(_name(str(node.target))))
        elif node.op == "call_function":
            made[node] = _call(node, made)
    results = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
    outputs = tuple(made[n] for n in pytree.tree_leaves(results) if isinstance(n, fx.Node))
    if not outputs or not all(isinstance(o, Call) for o in outputs):
        raise PassError("the traced pattern applies no op to its inputs", remedy="Trace one that does.")
    captures = [e.expr if isinstance(e, Param) else e for e in made.values()]
    return Pattern(outputs, tuple(c.name for c in captures if isinstance(c, Capture)))


def _name(text: str) -> str:
    return text.removeprefix("function.").replace(".", "_")


def _call(node: fx.Node, made: dict[fx.Node, Expr]) -> Call:
    family = family_of(node.target)
    args, kwargs = pytree.tree_map_only(fx.Node, made.__getitem__, (tuple(node.args), dict(node.kwargs)))
    if family in SHAPED:
        args = args[:1]
    if family in SCALED:
        kwargs = {"alpha": 1, **kwargs}
    named = family in FAMILIES and node.target in overloads(family)
    targets = frozenset(overloads(family) if named else (node.target,))
    return Call(family, targets, family in COMMUTATIVE, args, kwargs)
