"""Pass, PassResult, Pipeline: functions from graph to graph, in a visible order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from graphq.graph.invariants import check_graph
from graphq.graph.matcher import Match, RuleIndex
from graphq.graph.pattern import Expr
from graphq.graph.view import drop_unused_parameters


@dataclass
class PassResult:
    """What a pass did: how many places it changed, and where a rule fitted but declined, with its reason."""

    name: str
    changed: int = 0
    declined: list[tuple[str, str, str]] = field(default_factory=list)  # (rule, where, reason)


class Rewrite:
    """A rule that replaces what its pattern finds. Write the three functions; `check` returns why not, or None."""

    pattern: ClassVar[Callable[..., Expr]]

    @staticmethod
    def check(m: Match) -> str | None:
        return None

    @staticmethod
    def rewrite(m: Match) -> Any:
        """Build the replacement of the root with `m.call` and return its node."""
        raise NotImplementedError


Pass = Callable[[fx.GraphModule], PassResult]


class RewritePass:
    """Applies rewrites wherever they fit: every node once, and again the nodes next to each replacement."""

    def __init__(self, *rules: type[Rewrite], name: str | None = None) -> None:
        self.name = name or "+".join(r.__name__ for r in rules)
        self._index = RuleIndex(rules)

    @torch.no_grad()  # else a rewritten weight would keep all that it was computed from
    def __call__(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult(self.name)
        work = deque(gm.graph.nodes)
        erased: set[fx.Node] = set()
        while work:
            node = work.popleft()
            if node in erased:
                continue
            for rule, match in self._index.at(gm, node):
                reason = rule.check(match)
                if reason is not None:
                    result.declined.append((rule.__name__, match.root.where(), reason))
                    continue
                replacement = rule.rewrite(match)
                replacement = getattr(replacement, "node", replacement)
                node.replace_all_uses_with(replacement)
                erased |= _erase_dead(gm.graph, match.nodes)
                work.extend([*match.created, replacement, *replacement.users])
                result.changed += 1
                break
        return result


def _erase_dead(graph: fx.Graph, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Erase the matched ops that nothing uses any more; `nodes` has users before producers."""
    gone: set[fx.Node] = set()
    for node in nodes:
        if node not in gone and not node.users:
            graph.erase_node(node)
            gone.add(node)
    return gone


class Pipeline:
    """Passes in order; dead code goes and the module is recompiled once, at the end."""

    def __init__(self, name: str, passes: Sequence[Pass]) -> None:
        self.name, self.passes = name, list(passes)

    def __call__(self, gm: fx.GraphModule) -> list[PassResult]:
        results = [p(gm) for p in self.passes]
        finish(gm)
        return results


def finish(gm: fx.GraphModule) -> None:
    """Leave the graph clean: no dead code, no unused tensors, invariants checked, code compiled."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    drop_unused_parameters(gm)
    check_graph(gm)
    gm.recompile()
