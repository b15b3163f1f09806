"""Match: one place where a pattern fits, with the words that build its replacement. RuleIndex: which rules to try.

At one node rules are tried in the order in which they were given, and the bindings of one rule (commuted operands) in
the order in which the pattern is written; the first that `check` lets through counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from graphq.graph.decision import KEY as DECISION
from graphq.graph.matcher import Binding, find
from graphq.graph.pattern import Call, Chain, Either, Once, Pattern, compile_pattern
from graphq.graph.view import LayerView, is_float, parameter, set_parameter


class Match:
    """One place where a pattern fits. Captures and ops are attributes: `m.x`, `m.conv`, `m.bias` (None if absent).

    A node comes as a LayerView, a constant as itself, what `op.each` met as a tuple. `m.root` is the last op (`m.roots`
    where a pattern has several results); two ops of one family are `m.conv` (nearest the root) and `m.conv_1`.
    The methods build the replacement in front of the root.
    """

    def __init__(self, gm: fx.GraphModule, pattern: Pattern, binding: Binding) -> None:
        self.gm, self.pattern = gm, pattern
        self.created: list[fx.Node] = []
        self.origins: dict[fx.Node, fx.Node] = {}  # what was built → the op whose metadata it has
        self.nodes: list[fx.Node] = []  # matched ops, users before producers
        self._bound: dict[str, Any] = dict.fromkeys(pattern.captures)
        for expr, met in binding.items():
            if isinstance(expr, str):
                self._bound[expr] = met
        for expr, met in binding.items():
            if isinstance(expr, (Call, Chain)):
                self.nodes.extend(met if isinstance(met, tuple) else (met,))
                self._bound[self._unique(expr.name)] = met[0] if isinstance(expr, Chain) else met
        self.roots = [LayerView(gm, _matched(binding, expr)) for expr in pattern.outputs]
        self.root = self.roots[0]
        self.front = self.root.node  # replacements are built in front of it

    def _unique(self, name: str) -> str:
        unique, number = name, 0
        while unique in self._bound:
            number += 1
            unique = f"{name}_{number}"
        return unique

    def __getattr__(self, name: str) -> Any:
        bound = self.__dict__.get("_bound", {})
        if name not in bound:
            raise AttributeError(f"this match binds {sorted(bound)}, not {name!r}")
        value = bound[name]
        if isinstance(value, tuple):
            return tuple(LayerView(self.gm, v) if isinstance(v, fx.Node) else v for v in value)
        return LayerView(self.gm, value) if isinstance(value, fx.Node) else value

    def __contains__(self, name: str) -> bool:
        return name in self._bound

    def node(self, name: str) -> Any:
        """What a name is bound to, without the LayerView: a node, a constant or None."""
        return self._bound[name]

    def tensor(self, name: str) -> Any:
        """The parameter (a Tensor) that a capture is bound to; None if it is absent or computed."""
        value = self._bound[name]
        return parameter(self.gm, value) if isinstance(value, fx.Node) else None

    def not_float(self, name: str) -> str | None:
        """Why a capture is not a float tensor, for `check`; None if it is one."""
        value = self._bound[name]
        if isinstance(value, fx.Node) and is_float(value):
            return None
        return f"{name} is not a float tensor"

    def call(self, target: Any, *args: Any, like: LayerView | None = None, **kwargs: Any) -> fx.Node:
        """A new op in front of the root; its metadata (module path, value) is that of `like`, or of the root.

        What was decided on an op goes to the new op that is explicitly `like` it.
        """
        plain = fx.node.map_aggregate((args, kwargs), lambda a: a.node if isinstance(a, LayerView) else a)
        with self.gm.graph.inserting_before(self.front):
            node = self.gm.graph.call_function(target, *plain)  # type: ignore[misc]
        origin = (like or self.root).node
        node.meta.update(origin.meta)
        if like is None:
            node.meta.pop(DECISION, None)
        self.created.append(node)
        self.origins[node] = origin
        return node

    def valued(self, node: fx.Node) -> bool:
        """Has `rewrite` given this node an example value of its own?"""
        return node.meta.get("val") is not self.origins[node].meta.get("val")

    def param(self, name: str, tensor: Tensor) -> fx.Node:
        """A new parameter of the graph, read in front of the root."""
        target = set_parameter(self.gm, name, tensor)
        with self.gm.graph.inserting_before(self.front):
            node = self.gm.graph.get_attr(target)
        node.meta = {"val": tensor}
        return node


def _matched(binding: Binding, expr: Any) -> fx.Node:
    """The node at which an expression of the pattern ended."""
    if isinstance(expr, Once):
        return _matched(binding, expr.expr)
    if isinstance(expr, Either):
        return next(_matched(binding, e) for e in expr.options if e in binding)
    met = binding[expr]
    return met[0] if isinstance(met, tuple) else met


class RuleIndex:
    """Patterns compiled once, found by the op at their root and the ops that make its first two arguments; for one op
    in the order in which they were given."""

    def __init__(self, rules: Sequence[Any]) -> None:
        self.compiled = [(rule, compile_pattern(rule.pattern)) for rule in rules]
        self._by_root: dict[Any, list[tuple[Any, Pattern]]] = {}
        for rule, pattern in self.compiled:
            for target in pattern.roots:
                self._by_root.setdefault(target, []).append((rule, pattern))
        self._fitting: dict[Any, list[tuple[Any, Pattern]]] = {}  # filled as ops are met

    def candidates(self, graph: fx.Graph) -> list[fx.Node]:
        """The nodes at which a rule can end, in the order of the graph; no other node is looked at."""
        return sorted(n for target in self._by_root for n in graph.find_nodes(op="call_function", target=target))

    def at(self, gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[Any, Iterator[Match]]]:
        """Every rule with this op at its root, and its matches there: one, or several where operands commute."""
        if node.op != "call_function":
            return
        makers = tuple(a.target if isinstance(a, fx.Node) and a.op == "call_function" else None for a in node.args[:2])
        key = (node.target, makers)
        fitting = self._fitting.get(key)
        if fitting is None:
            fitting = [(r, p) for r, p in self._by_root.get(node.target, ()) if _may_fit(p.expr, makers)]
            self._fitting[key] = fitting
        for rule, pattern in fitting:
            yield rule, (Match(gm, pattern, bound) for bound in find(pattern, node))


def _may_fit(expr: Any, makers: tuple[Any, ...]) -> bool:
    """Can the first arguments of the pattern's last op be made by these ops?"""
    while isinstance(expr, Once):
        expr = expr.expr
    if not isinstance(expr, Call):
        return True
    wanted = [_made_by(a) for a in expr.args[:2]]
    orders = [wanted, wanted[::-1]] if expr.commutes and len(expr.args) == 2 else [wanted]
    return any(all(w is None or m in w for w, m in zip(order, makers, strict=False)) for order in orders)


def _made_by(expr: Any) -> frozenset[Any] | None:
    """The ops that an argument must come from, or None where it may be anything."""
    while isinstance(expr, Once):
        expr = expr.expr
    return expr.targets if isinstance(expr, (Call, Chain)) else None
