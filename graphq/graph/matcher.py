"""How an expression of a pattern is bound to the nodes of a graph.

Recursion follows the pattern, never the graph. Where a `Trail` is given, it keeps what stopped the match that came
furthest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, fx

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
    constant,
    walk,
)
from graphq.graph.view import parameter, schema_of

Binding = dict[Any, Any]  # capture name → value; Call, Chain → the node (Each: a tuple of nodes) that it matched


class Edge(NamedTuple):
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
    orders = arguments(expr, value.target) if isinstance(value, fx.Node) else None
    if orders is None:
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
    if trail and not orders:
        trail.stop(bound, value, f"{named(value)} does not take the arguments of the pattern")
    bound = {**bound, expr: value}
    for order in orders:
        yield from _match_arguments(value, order, 0, bound, trail)


class Argument(NamedTuple):
    """What a pattern asks of one argument of an op."""

    expr: Any
    name: str
    position: int
    default: Any
    match: Callable[..., Iterator[Binding]]

    def of(self, node: fx.Node) -> Any:
        """The argument's value in a call."""
        given = node.args
        return given[self.position] if self.position < len(given) else node.kwargs.get(self.name, self.default)


def arguments(expr: Call, target: Any) -> tuple[tuple[Argument, ...], ...] | None:
    """What a pattern asks of the arguments of an op, in every order it allows; none if the op does not take them, None
    if it is another op."""
    known = expr.orders.get(target)
    if known is not None:
        return known
    if target not in expr.targets:
        return None
    names, defaults = schema_of(target)
    takes = len(expr.args) <= len(names) and all(k in defaults or k in names for k in expr.kwargs)
    orders = [expr.args, expr.args[::-1]] if expr.commutes and len(expr.args) == 2 else [expr.args]
    expr.orders[target] = tuple(
        tuple(
            # what is quickly refused first; captures take whatever is left
            sorted(
                (
                    Argument(e, name, names.index(name), defaults.get(name), _MATCHERS.get(type(e), _match_constant))
                    for name, e in (*expr.kwargs.items(), *zip(names, order, strict=False))
                ),
                key=lambda argument: _cost(argument.expr),
            )
        )
        for order in orders
        if takes
    )
    return expr.orders[target]


def _cost(expr: Any) -> int:
    return 2 if isinstance(expr, Capture) else 1 if isinstance(expr, (Call, Chain, Once, Either, Each)) else 0


def _match_arguments(
    node: fx.Node, order: tuple[Argument, ...], at: int, bound: Binding, trail: Trail | None
) -> Iterator[Binding]:
    if not order:  # an op without arguments
        yield bound
        return
    argument = order[at]
    met = argument.match(argument.expr, argument.of(node), bound, Edge(node, argument.name), trail)
    if at == len(order) - 1:
        yield from met
    else:
        for more in met:
            yield from _match_arguments(node, order, at + 1, more, trail)


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
    if len(pattern.outputs) == 1:
        return match_expr(pattern.expr, node, {}, ROOT, trail)
    return _several(pattern, node, trail)


def _several(pattern: Pattern, node: fx.Node, trail: Trail | None) -> Iterator[Binding]:
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
