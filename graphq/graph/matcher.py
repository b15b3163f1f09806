"""How patterns are found: rules indexed by root op, one walk over the graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from graphq.graph.pattern import Call, Capture, Either, Pattern, compile_pattern
from graphq.graph.view import LayerView, argument_names, arguments, parameter, set_parameter

Binding = dict[str, Any]
NODES = "\0nodes"  # key of the matched op nodes in a binding: tuple of (name, node), root first


def match_expr(expr: Any, value: Any, binding: Binding) -> Iterator[Binding]:
    """Every way to bind `expr` to a node or constant; recursion follows the pattern, never the graph."""
    if isinstance(expr, Capture):
        if expr.name not in binding:
            yield {**binding, expr.name: value}
        elif binding[expr.name] is value or (not isinstance(value, fx.Node) and binding[expr.name] == value):
            yield binding
    elif isinstance(expr, Either):
        for option in expr.options:
            yield from match_expr(option, value, binding)
    elif isinstance(expr, Call):
        if isinstance(value, fx.Node) and value.target in expr.targets:
            yield from _match_call(expr, value, binding)
    elif isinstance(expr, bool) or expr is None:
        if value is expr:
            yield binding
    elif isinstance(expr, (int, float)):
        if isinstance(value, (int, float)) and math.isclose(expr, value, rel_tol=1e-6, abs_tol=1e-12):
            yield binding
    elif isinstance(expr, (list, tuple)):
        if isinstance(value, (list, tuple)) and len(value) == len(expr):
            yield from _match_all(list(zip(expr, value, strict=True)), binding)
    elif expr == value:
        yield binding


def _match_call(expr: Call, node: fx.Node, binding: Binding) -> Iterator[Binding]:
    values = arguments(node)
    names = argument_names(node)
    if len(expr.args) > len(names) or any(k not in values for k in expr.kwargs):
        return
    fixed = [(e, values[k]) for k, e in expr.kwargs.items()]
    orders = [expr.args, expr.args[::-1]] if expr.commutes and len(expr.args) == 2 else [expr.args]
    binding = {**binding, NODES: (*binding.get(NODES, ()), (expr.name, node))}
    for order in orders:
        pairs = [(e, values.get(k)) for e, k in zip(order, names, strict=False)]
        yield from _match_all(fixed + pairs, binding)


def _match_all(pairs: list[tuple[Any, Any]], binding: Binding) -> Iterator[Binding]:
    if not pairs:
        yield binding
        return
    (expr, value), rest = pairs[0], pairs[1:]
    for bound in match_expr(expr, value, binding):
        yield from _match_all(rest, bound)


class Match:
    """One place where a pattern fits. Captures and ops are attributes: `m.x`, `m.conv`, `m.bias` (None if absent).

    A node comes as a LayerView, a constant as itself. `m.root` is the last op; two ops of one family are
    `m.conv` (nearest the root) and `m.conv_1`. The methods build the replacement in front of the root.
    """

    def __init__(self, gm: fx.GraphModule, binding: Binding) -> None:
        self.gm = gm
        named = list(binding.pop(NODES))
        self.nodes: list[fx.Node] = [node for _, node in named]
        self.created: list[fx.Node] = []
        self.root = LayerView(gm, self.nodes[0])
        self._bound: dict[str, Any] = dict(binding)
        for name, node in named:
            unique, number = name, 0
            while unique in self._bound:
                number += 1
                unique = f"{name}_{number}"
            self._bound[unique] = node

    def __getattr__(self, name: str) -> Any:
        bound = self.__dict__.get("_bound", {})
        if name not in bound:
            raise AttributeError(f"this match binds {sorted(bound)}, not {name!r}")
        value = bound[name]
        return LayerView(self.gm, value) if isinstance(value, fx.Node) else value

    def tensor(self, name: str) -> Any:
        """The parameter (a Tensor) that a capture is bound to; None if it is absent or computed."""
        value = self._bound[name]
        return parameter(self.gm, value) if isinstance(value, fx.Node) else None

    def call(self, target: Any, *args: Any, like: LayerView | None = None, **kwargs: Any) -> fx.Node:
        """A new op in front of the root; its metadata (module path, value) is that of `like`, or of the root."""
        plain = fx.node.map_aggregate((args, kwargs), lambda a: a.node if isinstance(a, LayerView) else a)
        with self.gm.graph.inserting_before(self.root.node):
            node = self.gm.graph.call_function(target, *plain)  # type: ignore[misc]
        node.meta = dict((like or self.root).node.meta)
        self.created.append(node)
        return node

    def param(self, name: str, tensor: Tensor) -> fx.Node:
        """A new parameter of the graph, read in front of the root."""
        target = set_parameter(self.gm, name, tensor)
        with self.gm.graph.inserting_before(self.root.node):
            node = self.gm.graph.get_attr(target)
        node.meta = {"val": tensor}
        return node


class RuleIndex:
    """Patterns compiled once, found by the op at their root; for one op in the order in which they were given."""

    def __init__(self, rules: Sequence[Any]) -> None:
        self._by_root: dict[Any, list[tuple[Any, Pattern]]] = {}
        for rule in rules:
            pattern = compile_pattern(rule.pattern)
            for target in pattern.roots:
                self._by_root.setdefault(target, []).append((rule, pattern))

    def at(self, gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[Any, Match]]:
        """Every rule that fits with its root at this node, with the first binding found."""
        if node.op != "call_function":
            return
        for rule, pattern in self._by_root.get(node.target, ()):
            binding = next(match_expr(pattern.expr, node, {}), None)
            if binding is not None:
                yield rule, Match(gm, binding)
