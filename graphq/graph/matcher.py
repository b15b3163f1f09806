"""How patterns are found: rules indexed by the op at their root, one walk over the graph.

Recursion follows the pattern, never the graph. At one node rules are tried in the order in which they were given, and
the bindings of one rule (commuted operands) in the order in which the pattern is written; the first that `check` lets
through counts. Where a `Trail` is given, it keeps what stopped the match that came furthest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from graphq.graph.decision import KEY as DECISION
from graphq.graph.pattern import (
    TOLERANCE,
    Call,
    Capture,
    Chain,
    Each,
    Either,
    Given,
    Number,
    Once,
    Param,
    Pattern,
    compile_pattern,
    constant,
    walk,
)
from graphq.graph.view import LayerView, is_float, parameter, schema_of, set_parameter

Binding = dict[Any, Any]  # capture name → value; Call, Chain → the node (Each: a tuple of nodes) that it matched


@dataclass(frozen=True)
class Edge:
    """Where a value stands, for messages: an argument of a node."""

    node: fx.Node | None
    argument: str

    def __str__(self) -> str:
        return f"`{self.argument}` of {named(self.node)}" if self.node is not None else "the last op"


ROOT = Edge(None, "")


def named(value: Any) -> str:
    """A node or constant in words: "conv2d (conv2d_3)"."""
    if not isinstance(value, fx.Node):
        return "absent" if value is None else repr(value)
    if value.op == "call_function":
        return f"{short(value.target)} ({value.name})"
    kind = {"placeholder": "the input", "get_attr": "the parameter"}.get(value.op, value.op)
    return f"{kind} {value.target if value.op == 'get_attr' else value.name}"


def short(target: Any) -> str:
    """An op without namespace and default overload."""
    return str(target).removeprefix("aten.").removesuffix(".default")


class Trail:
    """The failure that came furthest: after how many matched ops, at which node, and why."""

    def __init__(self) -> None:
        self.matched = -1
        self.node: fx.Node | None = None
        self.reason = ""

    def stop(self, binding: Binding, node: Any, reason: str) -> None:
        matched = sum(isinstance(k, (Call, Chain)) for k in binding)
        if matched > self.matched:
            self.matched, self.reason = matched, reason
            self.node = node if isinstance(node, fx.Node) else None


def match_expr(
    expr: Any, value: Any, bound: Binding, edge: Edge = ROOT, trail: Trail | None = None
) -> Iterator[Binding]:
    """Every way to bind `expr` to a node or constant."""
    matcher = _MATCHERS.get(type(expr), _match_constant)
    return matcher(expr, value, bound, edge, trail)


def _match_capture(expr: Capture, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    name = expr.name
    if name not in bound:
        yield {**bound, name: value}
    elif bound[name] is value or (not isinstance(value, fx.Node) and bound[name] == value):
        yield bound
    elif trail:
        trail.stop(bound, edge.node, f"{edge} is {named(value)}, but `{name}` is {named(bound[name])} already")


def _match_call(expr: Call, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    if not isinstance(value, fx.Node) or value.target not in expr.targets:
        if trail:
            wanted = " or ".join(sorted({short(t) for t in expr.targets}))
            trail.stop(bound, edge.node, f"{edge} is {named(value)}, the pattern asks for {wanted}")
        return
    if expr in bound:
        if bound[expr] is value:
            yield bound
        elif trail:
            trail.stop(bound, edge.node, f"{edge} is {named(value)}, the pattern asks for {named(bound[expr])} again")
        return
    names, defaults = schema_of(value.target)
    if len(expr.args) > len(names) or any(k not in defaults and k not in names for k in expr.kwargs):
        if trail:
            trail.stop(bound, value, f"{named(value)} does not take the arguments of the pattern")
        return
    bound = {**bound, expr: value}
    fixed = [(e, _argument(value, k, names, defaults), Edge(value, k)) for k, e in expr.kwargs.items()]
    given = [(_argument(value, k, names, defaults), Edge(value, k)) for k in names[: len(expr.args)]]
    orders = [expr.args, expr.args[::-1]] if expr.commutes and len(expr.args) == 2 else [expr.args]
    for order in orders:
        pairs = fixed + [(e, v, at) for e, (v, at) in zip(order, given, strict=True)]
        pairs.sort(key=_cost)  # what is quickly refused first; captures take whatever is left
        yield from _match_all(pairs, 0, bound, trail)


def _argument(node: fx.Node, name: str, names: tuple[str, ...], defaults: dict[str, Any]) -> Any:
    position = names.index(name)
    if position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, defaults.get(name))


def _cost(pair: tuple[Any, Any, Edge]) -> int:
    expr = pair[0]
    return 2 if isinstance(expr, Capture) else 1 if isinstance(expr, (Call, Chain, Once, Either, Each)) else 0


def _match_all(pairs: list[tuple[Any, Any, Edge]], at: int, bound: Binding, trail: Trail | None) -> Iterator[Binding]:
    if at == len(pairs):
        yield bound
        return
    expr, value, edge = pairs[at]
    for more in match_expr(expr, value, bound, edge, trail):
        yield from _match_all(pairs, at + 1, more, trail)


def _match_either(expr: Either, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    for option in expr.options:
        yield from match_expr(option, value, bound, edge, trail)


def _match_once(expr: Once, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    if isinstance(value, fx.Node) and len(value.users) > 1:
        if trail and any(match_expr(expr.expr, value, bound, edge)):
            others = ", ".join(named(u) for u in value.users if u is not edge.node)
            trail.stop({**bound, expr.expr: value}, value, f"{named(value)} is also read by {others}")
        return
    yield from match_expr(expr.expr, value, bound, edge, trail)


def _match_given(expr: Given, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    if value is not None:
        yield from match_expr(expr.expr, value, bound, edge, trail)
    elif trail:
        trail.stop(bound, edge.node, f"{edge} is absent")


def _match_param(expr: Param, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    if value is None or (isinstance(value, fx.Node) and value.op == "get_attr"):
        yield from match_expr(expr.expr, value, bound, edge, trail)
    elif trail:
        trail.stop(bound, edge.node, f"{edge} is computed by {named(value)}, the pattern asks for a parameter")


def _match_each(expr: Each, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    if not isinstance(value, (list, tuple)) or len(value) < expr.least:
        if trail:
            trail.stop(bound, edge.node, f"{edge} is not a list of {expr.least} or more")
        return
    inner = {e.name if isinstance(e, Capture) else e for e in walk(expr.expr) if isinstance(e, (Capture, Call, Chain))}
    collected: dict[Any, list[Any]] = {k: [] for k in inner}
    outer = {k: v for k, v in bound.items() if k not in inner}
    for position, member in enumerate(value):
        found = next(match_expr(expr.expr, member, outer, Edge(edge.node, f"{edge.argument}[{position}]"), trail), None)
        if found is None:
            return
        for key in inner:
            collected[key].append(found.get(key))
    yield {**bound, **{k: tuple(v) for k, v in collected.items()}}


def _match_chain(expr: Chain, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    if not _links(value, expr.targets):
        if trail:
            trail.stop(bound, edge.node, f"{edge} is {named(value)}, the pattern asks for a chain of {expr.name}")
        return
    users = list(value.users)
    if edge is ROOT and len(users) == 1 and _links(users[0], expr.targets):
        return  # a part of a longer chain, which is found from its own end
    links, leaves, stack = [value], [], list(reversed(value.args[:2]))
    while stack:
        term = stack.pop()
        if _links(term, expr.targets) and len(term.users) == 1:
            links.append(term)
            stack.extend(reversed(term.args[:2]))
        else:
            leaves.append(term)
    if len(leaves) < len(expr.terms) or (expr.rest is None and len(leaves) > len(expr.terms)):
        if trail:
            trail.stop(bound, value, f"{named(value)} has {len(leaves)} terms, the pattern asks for {len(expr.terms)}")
        return
    yield from _assign(expr, 0, leaves, {**bound, expr: tuple(links)}, Edge(value, "terms"), trail)


def _links(value: Any, targets: frozenset[Any]) -> bool:
    return isinstance(value, fx.Node) and value.target in targets and bool(value.kwargs.get("alpha", 1) == 1)


def _assign(
    expr: Chain, at: int, leaves: list[Any], bound: Binding, edge: Edge, trail: Trail | None
) -> Iterator[Binding]:
    """Terms that say more than a capture choose their leaves first."""
    terms = sorted(expr.terms, key=lambda t: isinstance(t, Capture))
    if at == len(terms):
        if expr.rest is None:
            yield bound
        else:
            yield from _match_capture(expr.rest, tuple(leaves), bound, edge, trail)
        return
    for position, leaf in enumerate(leaves):
        for more in match_expr(terms[at], leaf, bound, edge, trail):
            yield from _assign(expr, at + 1, leaves[:position] + leaves[position + 1 :], more, edge, trail)


def _match_number(expr: Number, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    met = constant(_tensor(value) if isinstance(value, fx.Node) else value)
    if (
        met is not None
        and not isinstance(met, bool)
        and math.isclose(expr.value, met, rel_tol=expr.tolerance, abs_tol=1e-12)
    ):
        yield bound
    elif trail:
        trail.stop(
            bound, edge.node, f"{edge} is {named(value) if met is None else met}, the pattern asks for {expr.value}"
        )


def _match_constant(expr: Any, value: Any, bound: Binding, edge: Edge, trail: Trail | None) -> Iterator[Binding]:
    if isinstance(expr, (int, float)) and not isinstance(expr, bool):
        yield from _match_number(Number(expr, TOLERANCE), value, bound, edge, trail)
    elif isinstance(expr, (list, tuple)) and isinstance(value, (list, tuple)) and len(value) == len(expr):
        pairs = [
            (e, v, Edge(edge.node, f"{edge.argument}[{i}]")) for i, (e, v) in enumerate(zip(expr, value, strict=True))
        ]
        yield from _match_all(pairs, 0, bound, trail)
    elif value is expr or (not isinstance(expr, (bool, list, tuple)) and expr is not None and expr == value):
        yield bound
    elif trail:
        trail.stop(bound, edge.node, f"{edge} is {named(value)}, the pattern asks for {named(expr)}")


def _tensor(node: fx.Node) -> Tensor | None:
    owner = node.graph.owning_module
    return parameter(owner, node) if owner is not None and node.op == "get_attr" else None


_MATCHERS: dict[type, Callable[..., Iterator[Binding]]] = {
    Capture: _match_capture, Call: _match_call, Either: _match_either, Once: _match_once, Given: _match_given,
    Param: _match_param, Each: _match_each, Chain: _match_chain, Number: _match_number,
}  # fmt: skip


def find(pattern: Pattern, node: fx.Node, trail: Trail | None = None) -> Iterator[Binding]:
    """Every binding of a pattern whose first result is this node."""
    for bound in match_expr(pattern.expr, node, {}, ROOT, trail):
        yield from _others(pattern.outputs[1:], bound, (node,), trail)


def _others(
    exprs: tuple[Any, ...], bound: Binding, roots: tuple[fx.Node, ...], trail: Trail | None
) -> Iterator[Binding]:
    """The further results of a pattern, looked for among the readers of what is bound."""
    if not exprs:
        yield bound
        return
    for node in _candidates(exprs[0], bound):
        if node not in roots:
            for more in match_expr(exprs[0], node, bound, ROOT, trail):
                yield from _others(exprs[1:], more, (*roots, node), trail)


def _candidates(expr: Any, bound: Binding) -> list[fx.Node]:
    """Nodes at which `expr` can end: readers, and their readers, of something bound inside it."""
    if isinstance(expr, (Once, Given, Param)):
        return _candidates(expr.expr, bound)
    if isinstance(expr, Either):
        return list(dict.fromkeys(n for option in expr.options for n in _candidates(option, bound)))
    known = bound.get(expr.name if isinstance(expr, Capture) else expr)
    if isinstance(known, fx.Node):
        return [known]
    if not isinstance(expr, (Call, Chain)):
        return []
    for child in (c for c in walk(expr) if c is not expr and isinstance(c, (Call, Capture, Chain, Either))):
        readers = dict.fromkeys(u for n in _candidates(child, bound) for u in n.users)
        if isinstance(expr, Chain):  # its end may be some sums further down
            readers |= dict.fromkeys(u for r in list(readers) for u in r.users)
        found = [u for u in readers if u.target in expr.targets]
        if found:
            return found
    return []


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
        self._bound |= {k: v for k, v in binding.items() if isinstance(k, str)}
        for expr, met in binding.items():
            if isinstance(expr, (Call, Chain)):
                self.nodes.extend(met if isinstance(met, tuple) else [met])
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
        node.meta = dict(origin.meta)
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
        if node.op != "call_function" or node.target not in self._by_root:
            return
        makers = tuple(a.target if isinstance(a, fx.Node) and a.op == "call_function" else None for a in node.args[:2])
        key = (node.target, makers)
        if key not in self._fitting:
            self._fitting[key] = [(r, p) for r, p in self._by_root[node.target] if _may_fit(p.expr, makers)]
        for rule, pattern in self._fitting[key]:
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
