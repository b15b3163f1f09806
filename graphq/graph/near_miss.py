"""Why a pattern did not match: the places where it came furthest, and the first thing that stopped it there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphq.graph.match import Match
from graphq.graph.matcher import ROOT, Trail, find, match_expr, named, short
from graphq.graph.pattern import Call, Given, Once, Pattern, compile_pattern, walk
from graphq.graph.view import LayerView


@dataclass(frozen=True)
class Miss:
    """A place where a pattern nearly fits. matched of total: how many of its ops were found."""

    where: str
    matched: int
    total: int
    reason: str


@dataclass
class RuleReport:
    """What a rule finds in a graph: where it fits, and where it nearly does, nearest first."""

    name: str
    matches: list[Match]
    misses: list[Miss]


def report(gm: fx.GraphModule, rule: Any, most: int = 5) -> RuleReport:
    """Look for a Rewrite or QuantPattern in a graph without changing it; `most` near misses are kept."""
    pattern = compile_pattern(rule.pattern)
    matches: list[Match] = []
    misses: list[tuple[fx.Node, Miss]] = []
    seen: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        match, miss = _at(gm, rule, pattern, node)
        if match is not None:
            if not any(set(match.nodes) == set(m.nodes) for m in matches[-len(pattern.outputs) :]):
                matches.append(match)
            seen |= set(match.nodes)
        elif miss is not None:
            misses.append((node, miss))
    misses += [(n, m) for n, m in _inside(gm, pattern) if n not in seen]
    ranked = sorted((m for n, m in misses if n not in seen), key=lambda m: -m.matched)
    return RuleReport(rule.__name__, matches, _distinct(ranked)[:most])


def _at(gm: fx.GraphModule, rule: Any, pattern: Pattern, node: fx.Node) -> tuple[Match | None, Miss | None]:
    """The match at a node, or how near it came there."""
    if node.target not in pattern.roots:
        return None, None
    trail, refused = Trail(), None
    for bound in find(pattern, node, trail):
        match = Match(gm, pattern, bound)
        reason = rule.check(match)
        if reason is None:
            return match, None
        refused = refused or Miss(match.root.where(), len(match.nodes), len(match.nodes), f"check: {reason}")
    if refused is None and trail.matched > 0:
        refused = Miss(LayerView(gm, node).where(), trail.matched, _size(pattern), trail.reason)
    return None, refused


def _inside(gm: fx.GraphModule, pattern: Pattern) -> Iterator[tuple[fx.Node, Miss]]:
    """Places where an inner expression of the pattern fits, but something else than the pattern's op reads it."""
    calls = [e for output in pattern.outputs for e in walk(output) if isinstance(e, Call)]
    for outer in calls:
        for inner in (e for e in map(_bare, outer.args) if isinstance(e, Call)):
            for node in gm.graph.nodes:
                if node.op != "call_function" or node.target not in inner.targets:
                    continue
                bound = next(match_expr(inner, node, {}, ROOT), None)
                if bound is None or any(u.target in outer.targets for u in node.users):
                    continue
                wanted = " or ".join(sorted({short(t) for t in outer.targets}))
                readers = ", ".join(named(u) for u in node.users) or "nothing"
                reason = f"{named(node)} is read by {readers}, the pattern asks for {wanted}"
                matched = sum(isinstance(k, Call) for k in bound)
                yield node, Miss(LayerView(gm, node).where(), matched, _size(pattern), reason)


def _bare(expr: Any) -> Any:
    while isinstance(expr, (Once, Given)):
        expr = expr.expr
    return expr


def _size(pattern: Pattern) -> int:
    return len({e for output in pattern.outputs for e in walk(output) if isinstance(e, Call)})


def _distinct(misses: list[Miss]) -> list[Miss]:
    return list(dict.fromkeys(misses))
