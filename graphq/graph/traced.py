"""A pattern traced from a module or a function: what the user's own block becomes in a graph.

Inputs and parameters become captures, by their names; ops, numbers and attributes must be the same, defaults included.
Only the sizes of view, reshape and expand, which follow from shapes, are left free.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from graphq.errors import PassError
from graphq.graph.capture import capture
from graphq.graph.optable import COMMUTATIVE, family_of
from graphq.graph.pattern import Call, Capture, Expr, Param, Pattern
from graphq.graph.view import arguments, schema_of

aten = torch.ops.aten
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})
SIZED = VIEWS | {aten.expand.default}  # their arguments after the first are sizes


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
    taken: set[str] = set()
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            made[node] = Capture(_unique(node.name, taken))
        elif node.op == "get_attr":
            made[node] = Param(Capture(_unique(str(node.target), taken)))
        elif node.op == "call_function":
            made[node] = _call(node, made)
    results = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
    outputs = tuple(made[n] for n in pytree.tree_leaves(results) if isinstance(n, fx.Node))
    if not outputs or not all(isinstance(o, Call) for o in outputs):
        raise PassError("the traced pattern applies no op to its inputs", remedy="Trace one that does.")
    captures = [e.expr if isinstance(e, Param) else e for e in made.values()]
    return Pattern(outputs, tuple(c.name for c in captures if isinstance(c, Capture)))


def _unique(text: str, taken: set[str]) -> str:
    base = name = text.removeprefix("function.").replace(".", "_")
    number = 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    taken.add(name)
    return name


def _call(node: fx.Node, made: dict[fx.Node, Expr]) -> Call:
    given = pytree.tree_map_only(fx.Node, made.__getitem__, arguments(node))
    names = schema_of(node.target)[0]
    targets = VIEWS if node.target in VIEWS else frozenset({node.target})
    if node.target in SIZED:
        given = {names[0]: given[names[0]]}
    family = family_of(node.target)
    positional = 2 if family in COMMUTATIVE else 0  # operands that may change places
    args = tuple(given.pop(n) for n in names[:positional])
    return Call(family, targets, family in COMMUTATIVE, args, given)
