"""Pass, PassResult, Pipeline: functions from graph to graph, in a visible order."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphq.errors import PassError, did_you_mean
from graphq.graph.capture import example_of
from graphq.graph.equivalence import Equivalence, broken, weakest
from graphq.graph.garbage import uncollected
from graphq.graph.generated import generate_when_called
from graphq.graph.infer import infer
from graphq.graph.invariants import Invariant, check_all, check_graph, is_checking
from graphq.graph.match import Match, RuleIndex
from graphq.graph.pattern import Expr, Pattern
from graphq.graph.view import drop_unused_parameters


@dataclass
class PassResult:
    """What a pass did: how many places it changed, and where a rule fitted but declined, with its reason."""

    name: str
    changed: int = 0
    declined: list[tuple[str, str, str]] = field(default_factory=list)  # (rule, where, reason)
    by_rule: Counter[str] = field(default_factory=Counter)


class Rewrite:
    """A rule that replaces what its pattern finds. Write the three functions; `check` returns why not, or None.

    equivalence: what the rule promises about the result; `graphq.testing.prove` looks for a graph that breaks it.
    """

    pattern: ClassVar[Callable[..., Expr] | Pattern]
    equivalence: ClassVar[Equivalence] = "ulp"

    @staticmethod
    def check(m: Match) -> str | None:
        return None

    @staticmethod
    def rewrite(m: Match) -> Any:
        """Build the replacement of the root with `m.call` and return its node."""
        raise NotImplementedError


class Pass(Protocol):
    """A step of a pipeline. requires, ensures: invariants before and after it, checked inside `checking()`."""

    name: str
    requires: tuple[Invariant, ...]
    ensures: tuple[Invariant, ...]
    equivalence: Equivalence

    def __call__(self, gm: fx.GraphModule) -> PassResult: ...


class FunctionPass:
    """A function that changes a graph and says in how many places, as a pass."""

    def __init__(
        self,
        function: Callable[[fx.GraphModule], int],
        *,
        requires: tuple[Invariant, ...] = (),
        ensures: tuple[Invariant, ...] = (),
        equivalence: Equivalence = "exact",
    ) -> None:
        self.function, self.name, self.__doc__ = function, function.__name__, function.__doc__
        self.requires, self.ensures, self.equivalence = requires, ensures, equivalence

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        return checked(self, gm, lambda: PassResult(self.name, self.function(gm)))


class RewritePass:
    """Applies rewrites wherever they fit, in one walk over the graph.

    Nodes are visited in the order of the graph; of several rules at one node the first that fits and does not decline
    is applied, and what it matched is gone for the others. fixpoint: visit what a rewrite made, and its readers, again.
    """

    def __init__(
        self,
        *rules: type[Rewrite],
        name: str | None = None,
        fixpoint: bool = False,
        requires: tuple[Invariant, ...] = (),
        ensures: tuple[Invariant, ...] = (),
    ) -> None:
        self.name = name or "+".join(r.__name__ for r in rules)
        self.rules, self.fixpoint, self.requires, self.ensures = rules, fixpoint, requires, ensures
        self.equivalence = weakest(r.equivalence for r in rules)
        self._index = RuleIndex(rules)

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        return checked(self, gm, lambda: self._run(gm))

    @uncollected()
    @torch.no_grad()  # else a rewritten weight would keep all that it was computed from
    def _run(self, gm: fx.GraphModule) -> PassResult:
        result = PassResult(self.name)
        work = deque(self._index.candidates(gm.graph))
        limit = 100 * len(gm.graph.nodes) + 1000
        erased: set[fx.Node] = set()
        while work:
            node = work.popleft()
            if node in erased:
                continue
            applied = self._apply(gm, node, result)
            if applied is not None:
                match, replacements = applied
                if result.changed > limit:
                    rules = " and ".join(rule for rule, _ in result.by_rule.most_common(2))
                    raise PassError(
                        f"the pass {self.name} does not come to an end",
                        where=match.root.where(),
                        remedy=f"What {rules} build must not be what they look for.",
                    )
                gone = _erase_dead(gm.graph, match.nodes)
                erased |= gone
                _keep_names(match, gone)
                if self.fixpoint:
                    work.extend([*match.created, *replacements, *(u for r in replacements for u in r.users)])
        return result

    def _apply(self, gm: fx.GraphModule, node: fx.Node, result: PassResult) -> tuple[Match, list[fx.Node]] | None:
        """The match that was rewritten at this node, and what stands there now."""
        for rule, matches in self._index.at(gm, node):
            declined = None
            for match in matches:
                late = readers_between(match)
                reason = late if isinstance(late, str) else rule.check(match)
                if reason is not None:
                    declined = declined or (rule.__name__, match.root.where(), reason)
                    continue
                replacements = _replace(match, rule.rewrite(match))
                for reader in [] if isinstance(late, str) else reversed(late):
                    match.front.append(reader)
                result.changed += 1
                result.by_rule[rule.__name__] += 1
                return match, replacements
            if declined:
                result.declined.append(declined)
        return None


def readers_between(match: Match) -> list[fx.Node] | str:
    """Of a match with several results: the nodes that read one before the last is computed, and so must move behind
    it. A reason where one of them is an input of the match: then the results cannot be computed together."""
    if len(match.roots) == 1:
        return []
    roots = sorted(r.node for r in match.roots)
    match.front = roots[-1]
    late: dict[fx.Node, None] = {}
    matched = {*match.nodes}
    node = roots[0].next
    while node is not roots[-1]:
        if any(i in late or i in roots for i in node.all_input_nodes):
            late[node] = None
        node = node.next
    for reader in late:
        if reader in matched or any(u in matched for u in reader.users):
            return f"{reader.name} is needed for one result of the pattern and depends on another result"
    return list(late)


def _replace(match: Match, built: Any) -> list[fx.Node]:
    """Put what `rewrite` returned in the place of the pattern's results."""
    built = list(built) if isinstance(built, (tuple, list)) else [built]
    if len(built) != len(match.roots) or any(b is None for b in built):
        raise PassError(
            f"rewrite returned {len(built)} values for a pattern with {len(match.roots)} results",
            where=match.root.where(),
            remedy="Return the node of every result, in the order of the pattern.",
        )
    nodes: list[fx.Node] = [getattr(b, "node", b) for b in built]
    for node in match.created:
        if node not in nodes and not match.valued(node):
            node.meta["val"] = infer(node)
    for root, node in zip(match.roots, nodes, strict=True):
        if node in match.created and not match.valued(node):
            node.meta["val"] = root.node.meta.get("val")
        root.node.replace_all_uses_with(node, delete_user_cb=lambda user: user not in match.created)
    return nodes


def _erase_dead(graph: fx.Graph, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Erase the matched ops that nothing uses any more."""
    gone: set[fx.Node] = set()
    for node in sorted(set(nodes), reverse=True):  # users before producers
        if not node.users:
            graph.erase_node(node)
            gone.add(node)
    return gone


def _keep_names(match: Match, gone: set[fx.Node]) -> None:
    """What was built goes by the name of the op whose place it takes, where that op is gone."""
    for node, origin in match.origins.items():
        if origin in gone and node not in gone:
            object.__setattr__(node, "name", origin.name)  # fx.Node would look its op up again, which stays
            gone = gone - {origin}


class Pipeline:
    """Passes in order; then dead code goes, and the graph's code is generated, once.

    `before`, `after` and `replace` give a new pipeline, so that a list in use never changes under its user.
    """

    def __init__(self, name: str, passes: Sequence[Pass]) -> None:
        for step in passes:
            if isinstance(step, type) or not hasattr(step, "ensures"):
                raise PassError(
                    f"{getattr(step, '__name__', step)!r} is no pass of a pipeline",
                    remedy="Wrap rules in RewritePass(Rule, …), functions in FunctionPass(function).",
                )
        self.name, self.passes = name, tuple(passes)

    def __call__(self, gm: fx.GraphModule) -> list[PassResult]:
        """Run all passes."""
        results = [p(gm) for p in self.passes]
        finish(gm)
        return results

    def __repr__(self) -> str:
        return f"{self.name}: {' → '.join(p.name for p in self.passes)}"

    def before(self, name: str, *new: Pass) -> Pipeline:
        """With passes in front of the one of that name."""
        at = self._index(name)
        return Pipeline(self.name, [*self.passes[:at], *new, *self.passes[at:]])

    def after(self, name: str, *new: Pass) -> Pipeline:
        """With passes behind the one of that name."""
        at = self._index(name) + 1
        return Pipeline(self.name, [*self.passes[:at], *new, *self.passes[at:]])

    def replace(self, name: str, *new: Pass) -> Pipeline:
        """With passes (or none) in the place of the one of that name."""
        at = self._index(name)
        return Pipeline(self.name, [*self.passes[:at], *new, *self.passes[at + 1 :]])

    def _index(self, name: str) -> int:
        names = [p.name for p in self.passes]
        if name not in names:
            raise PassError(f"the pipeline {self.name!r} has no pass {name!r}", remedy=did_you_mean(name, names))
        return names.index(name)


def checked(step: Pass, gm: fx.GraphModule, run: Callable[[], PassResult]) -> PassResult:
    """Run one pass; inside `checking()` also check what it requires, ensures and promises."""
    if not is_checking():
        result = run()
        generate_when_called(gm)
        return result
    check_all(gm, *step.requires, after=f"before {step.name}")
    wanted = _outputs(gm)
    result = run()
    generate_when_called(gm)
    check_all(gm, *step.ensures, after=step.name)
    reason = broken(step.equivalence, wanted, _outputs(gm))
    if reason is not None:
        raise PassError(
            f"the pass {step.name} promises {step.equivalence!r} results: {reason}",
            where=", ".join(f"{rule} ×{n}" for rule, n in result.by_rule.items()) or step.name,
            remedy="`graphq.testing.prove(rule)` finds a small graph on which a rule is wrong.",
        )
    return result


@torch.no_grad()
def _outputs(gm: fx.GraphModule) -> list[Any]:
    """What the graph gives on its example inputs, without compiling it."""
    example = example_of(gm)
    names = list(example.dynamic_shapes)
    given = dict(zip(names, example.args, strict=False)) | example.kwargs
    inputs = pytree.tree_leaves([given[n] for n in names if n in given])
    return pytree.tree_leaves(fx.Interpreter(gm).run(*inputs, enable_io_processing=False))


def finish(gm: fx.GraphModule) -> None:
    """Leave the graph clean: no dead code, no unused tensors, invariants checked, code generated."""
    gm.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    drop_unused_parameters(gm)
    check_graph(gm)
    gm.recompile()
