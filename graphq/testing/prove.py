"""prove: look for a graph on which a rule does not keep its promise, and shrink it."""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphq.errors import GraphqError, PassError
from graphq.graph.equivalence import Equivalence, broken
from graphq.graph.infer import MISFITS
from graphq.graph.invariants import checking, no_symbols, typed
from graphq.graph.passes import Rewrite, RewritePass, finish
from graphq.graph.pattern import compile_pattern
from graphq.testing.generate import Generator, Unfit
from graphq.testing.small_graph import SmallGraph

ENOUGH = 10  # rewritten graphs

Transform = Callable[[fx.GraphModule], int]


class Disproved(GraphqError):
    """A rule is wrong on a graph: `code` builds the smallest one that was found, `ops` says how many ops it has."""

    def __init__(self, rule: str, reason: str, graph: SmallGraph, check: str) -> None:
        self.reason, self.ops = reason, graph.ops
        self.code = f"{graph.code()}\n{check}"
        super().__init__(f"{rule}: {reason}", remedy=f"It can be run:\n\n{self.code}\n")


@dataclass
class Proof:
    """What was tried: graphs that contain the pattern, those that the rule rewrote, and why it declined the others."""

    rule: str
    graphs: int = 0
    rewritten: int = 0
    resized: int = 0  # of these, compared with another size of the dynamic dimension too
    declined: Counter[str] = field(default_factory=Counter)


def prove(
    rule: Any,
    *,
    examples: int = 100,
    transform: Transform | None = None,
    given: Callable[[fx.GraphModule], fx.GraphModule] | None = None,
    equivalence: Equivalence | None = None,
) -> Proof:
    """Generate graphs from the rule's pattern and check that the rewrite keeps what it promises.

    rule: a Rewrite, or anything with a pattern. examples: how many graphs; five times as many where the rule is picky.
    transform: what is done to the graph instead of applying the rule; it returns in how many places it changed it.
    given: brings the graph to the stage at which that works (or raises Unfit); its result is what the transformed
    graph is compared with. equivalence: instead of the rule's own promise.

    Raises Disproved with a minimal, runnable counterexample, and PassError if no generated graph was rewritten.
    """
    import hypothesis
    from hypothesis import strategies as st

    pattern = compile_pattern(rule.pattern)
    proof = Proof(rule.__name__)
    promise = equivalence or rule.equivalence

    settings = hypothesis.settings(
        deadline=None, database=None, derandomize=True, report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )  # fmt: skip

    def attempt(data: Any) -> None:
        try:
            graph = Generator(data.draw, st).graph(pattern)
            gm = graph.module() if given is None else given(graph.module())
        except (Unfit, PassError):  # torch refuses the arguments, or cannot tell their shapes
            hypothesis.reject()
        proof.graphs += 1
        _check(graph, gm, rule, promise, transform, proof)

    with _quiet():
        for budget in (examples, 5 * examples):  # where a rule is picky, look longer
            if proof.rewritten < ENOUGH:
                try:
                    hypothesis.settings(settings, max_examples=budget)(hypothesis.given(st.data())(attempt))()
                except hypothesis.errors.Unsatisfiable:
                    break
    if not proof.rewritten:
        why = "; ".join(f"{reason} (×{n})" for reason, n in proof.declined.most_common(3)) or (
            "the pattern matched none" if proof.graphs else "no legal graph with these ops could be made up"
        )
        raise PassError(
            f"nothing is proven about {proof.rule}: none of {proof.graphs} generated graphs was rewritten",
            where=why,
            remedy="Raise `examples`, or register a recipe for the op with `graphq.testing.recipe`.",
        )
    return proof


def check(graph: SmallGraph, rule: Any, **options: Any) -> Proof:
    """Check a rule on one graph; what `prove` prints as the counterexample calls it."""
    proof = Proof(rule.__name__)
    promise = options.pop("equivalence", None) or rule.equivalence
    gm = options.get("given", lambda gm: gm)(graph.module())
    _check(graph, gm, rule, promise, options.get("transform"), proof)
    return proof


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs every op whose shapes it cannot tell; here that only means another draw."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def apply(rule: type[Rewrite], proof: Proof) -> Transform:
    """The rule as a transform that also counts its refusals."""

    def transform(gm: fx.GraphModule) -> int:
        result = RewritePass(rule)(gm)
        proof.declined.update(reason for _, _, reason in result.declined)
        return result.changed

    return transform


def _check(
    graph: SmallGraph,
    gm: fx.GraphModule,
    rule: Any,
    promise: Equivalence,
    transform: Transform | None,
    proof: Proof,
) -> None:
    line = f"from {rule.__module__} import {rule.__name__}\n\ncheck(g, {rule.__name__})"
    feeds = [graph.feed(), *([graph.feed(more=2)] if graph.dynamic and not graph.fixed else [])]
    with torch.no_grad(), checking(False):
        wanted = [gm(*feeds[0]), *(_run(gm, feed) for feed in feeds[1:])]
        try:
            changed = (transform or apply(rule, proof))(gm)
            finish(gm)
            reason = (no_symbols(gm) or typed(gm)) if changed else None
        except GraphqError as e:
            raise Disproved(proof.rule, f"it builds an illegal graph: {e.what}", graph, line) from e
        except Exception as e:  # the rule is its author's code, and whatever it raises disproves it
            raise Disproved(proof.rule, f"it raises {type(e).__name__}: {e}", graph, line) from e
        if not changed:
            return
        if reason is not None:
            raise Disproved(proof.rule, f"a malformed graph: {reason}", graph, line)
        proof.rewritten += 1
        for number, (feed, before) in enumerate(zip(feeds, wanted, strict=True)):
            if before is None:
                continue
            proof.resized += number
            try:
                after = gm(*feed)
            except (*MISFITS, NameError) as e:
                reason = f"the rewritten graph fails: {str(e).splitlines()[0]}"
            else:
                reason = broken(promise, before, after) or ""
            if reason:
                rows = " with more rows in the dynamic dimension" if number else ""
                raise Disproved(proof.rule, f"not {promise}{rows}: {reason}", graph, line)


def _run(gm: fx.GraphModule, feed: list[torch.Tensor]) -> Any:
    """The results, or None where the graph itself does not take this number of rows."""
    try:
        return gm(*feed)
    except MISFITS:
        return None
