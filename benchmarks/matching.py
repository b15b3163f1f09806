"""How fast rules are matched: graphq against torch.fx and Inductor on the same graphs, in one run.

    python benchmarks/matching.py [--rounds 3] [--json out.json] [--check]

Graphs are chains of ATen ops in which every fifth node ends a place that a rule rewrites. All 60 rules end in the op
at which that rule ends, and the one that fits is the last of them. graphq and Inductor carry the same 60 (Inductor's in
its fastest form, graph patterns with a handler that builds the node), and Inductor also the one that fits alone.
torch.fx has no sets of rules: `replace_pattern` is called with that rule, and, for what the same rules cost, with one
after the other. A pass of graphq or of Inductor leaves the graph right without generating its Python code (graphq does
that when the graph is next called); `replace_pattern` generates it in every call. The same call on torch's own lazy
GraphModule leaves that out ("torch.fx, no code"), and "graphq and code" has it in. Beside them stands matching alone:
all matches of graphq's 60 rules, and those of `SubgraphMatcher` with the one. Every figure is the least of the rounds.

--check exits with 1 where a figure of the acceptance list fails: growth exponent ≤ 1.1; faster than Inductor with the
one rule at 50k nodes; ≥ 20 × torch.fx at 10k: in matching alone, with the same rules, and with its one rule against our
60, both as they are called. What that is with no code generated, and with code on both sides, is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import fx
from torch._inductor.pattern_matcher import CallFunction, KeywordArg, PatternMatcherPass, register_graph_pattern
from torch._subclasses import FakeTensorMode
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.passes.utils.matcher_utils import SubgraphMatcher

from graphq.authoring import Rewrite, RewritePass
from graphq.graph.match import RuleIndex

aten = torch.ops.aten
SIZES = (5_000, 10_000, 20_000, 50_000)
FILLER = (aten.neg.default, aten.abs.default, aten.sin.default)
RULES = 60


def chain(nodes: int) -> fx.GraphModule:
    """neg, abs, sin, relu, sigmoid, over and over: a fifth of the nodes ends `sigmoid(relu(x))`."""
    graph = fx.Graph()
    value = torch.empty(2, 4, device="meta")
    with FakeTensorMode() as mode:
        value = mode.from_tensor(torch.empty(2, 4))
    x = graph.placeholder("x")
    x.meta["val"] = value
    steps = (*FILLER, aten.relu.default, aten.sigmoid.default)
    for i in range(nodes):
        x = graph.call_function(steps[i % len(steps)], (x,))
        x.meta["val"] = value
    graph.output(x)
    return fx.GraphModule(torch.nn.Module(), graph)


OTHERS = ("exp", "erf", "tanh", "silu", "gelu", "sqrt", "rsqrt", "hardswish", "hardtanh", "elu", "log", "cos")


def inner(number: int):
    """The op that rule `number` wants before the sigmoid: relu for the last, one that is nowhere for the others."""
    return aten.relu.default if number == RULES - 1 else getattr(aten, OTHERS[number % len(OTHERS)]).default


def make_rule(number: int) -> type[Rewrite]:
    """sigmoid(inner(x)) ⇒ hardsigmoid(x) as a rule of graphq."""

    def pattern(op, x):
        return op.sigmoid(op.aten(inner(number))(x))

    def rewrite(m):
        return m.call(aten.hardsigmoid.default, m.x)

    return type(f"Rule{number}", (Rewrite,), {"pattern": staticmethod(pattern), "rewrite": staticmethod(rewrite)})


def time_graphq(nodes: int, code: bool = False) -> float:
    gm = chain(nodes)
    passes = RewritePass(*(make_rule(n) for n in range(RULES)))
    start = time.process_time()
    result = passes(gm)
    if code:
        gm.recompile()
    seconds = time.process_time() - start
    assert result.changed == nodes // 5, result.changed
    return seconds


def time_inductor(nodes: int, rules: range) -> float:
    gm = chain(nodes)
    passes = PatternMatcherPass()

    def rewrite(match, x):
        node = match.output_node()
        with node.graph.inserting_before(node):
            new = node.graph.call_function(aten.hardsigmoid.default, (x,))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        match.erase_nodes()

    for number in rules:
        pattern = CallFunction(aten.sigmoid.default, CallFunction(inner(number), KeywordArg("x")))
        register_graph_pattern(pattern, pass_dict=passes)(rewrite)
    start = time.process_time()
    count = passes.apply(gm.graph)
    seconds = time.process_time() - start
    assert count == nodes // 5, count
    return seconds


def time_fx(nodes: int, rules: range, code: bool = True) -> float:
    gm = chain(nodes) if code else _LazyGraphModule.from_graphmodule(chain(nodes))

    def replacement(x):
        return aten.hardsigmoid.default(x)

    def expression(number: int):
        return lambda x: aten.sigmoid.default(inner(number)(x))

    start = time.process_time()
    changed = [len(fx.replace_pattern(gm, expression(n), replacement)) for n in rules]
    seconds = time.process_time() - start
    assert changed[-1] == nodes // 5, changed
    return seconds


def match_graphq(nodes: int) -> float:
    gm = chain(nodes)
    index = RuleIndex([make_rule(n) for n in range(RULES)])
    start = time.process_time()
    count = sum(1 for node in index.candidates(gm.graph) for _, found in index.at(gm, node) for _ in found)
    seconds = time.process_time() - start
    assert count == nodes // 5, count
    return seconds


def match_fx(nodes: int) -> float:
    gm = chain(nodes)
    pattern = fx.symbolic_trace(lambda x: aten.sigmoid.default(aten.relu.default(x)))
    matcher = SubgraphMatcher(pattern.graph)
    start = time.process_time()
    count = len(matcher.match(gm.graph))
    seconds = time.process_time() - start
    assert count == nodes // 5, count
    return seconds


def exponent(times: dict[int, float]) -> float:
    """Slope of log time over log nodes, by least squares."""
    x, y = [math.log(n) for n in times], [math.log(t) for t in times.values()]
    mx, my = statistics.mean(x), statistics.mean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    sys.setrecursionlimit(10_000)
    every, one = range(RULES), range(RULES - 1, RULES)
    samples: dict[tuple[str, int], dict[int, list[float]]] = {}
    for _ in range(options.rounds):
        for n in SIZES:
            samples.setdefault(("graphq", RULES), {}).setdefault(n, []).append(time_graphq(n))
            samples.setdefault(("graphq and code", RULES), {}).setdefault(n, []).append(time_graphq(n, code=True))
            for rules in (every, one):
                seconds = time_inductor(n, rules)
                samples.setdefault(("inductor", len(rules)), {}).setdefault(n, []).append(seconds)
            samples.setdefault(("graphq, matching alone", RULES), {}).setdefault(n, []).append(match_graphq(n))
        for n in SIZES[:2]:
            samples.setdefault(("torch.fx, matching alone", 1), {}).setdefault(n, []).append(match_fx(n))
            samples.setdefault(("torch.fx", 1), {}).setdefault(n, []).append(time_fx(n, one))
            samples.setdefault(("torch.fx, no code", 1), {}).setdefault(n, []).append(time_fx(n, one, code=False))
    samples["torch.fx", RULES] = {10_000: [time_fx(10_000, every)]}
    times = {who: {n: min(t) for n, t in rows.items()} for who, rows in samples.items()}
    title = "cpu seconds, a fifth of the nodes rewritten"
    table = Table("matcher", "rules", *(f"{n // 1000}k" for n in SIZES), "exponent", title=title)
    for (who, rules_carried), rows in times.items():
        cells = [f"{rows[n]:.2f}" if n in rows else "" for n in SIZES]
        table.add_row(who, str(rules_carried), *cells, f"{exponent(rows):.2f}" if len(rows) > 1 else "")
    Console(width=120).print(table)
    ours = times["graphq", RULES]
    alone = times["torch.fx, matching alone", 1][10_000] / times["graphq, matching alone", RULES][10_000]
    fx_one = times["torch.fx", 1][10_000]
    figures = {
        "growth exponent": exponent(ours),
        "Inductor with one rule / graphq with 60, 50k": times["inductor", 1][50_000] / ours[50_000],
        "Inductor / graphq, same rules, 50k": times["inductor", RULES][50_000] / ours[50_000],
        "torch.fx with one rule / graphq with 60, matching alone, 10k": alone,
        "torch.fx / graphq, same rules, 10k": times["torch.fx", RULES][10_000] / ours[10_000],
        "torch.fx with one rule / graphq with 60, 10k": fx_one / ours[10_000],
        "torch.fx with one rule / graphq with 60, no code generated, 10k": times["torch.fx, no code", 1][10_000]
        / ours[10_000],
        "torch.fx with one rule / graphq with 60, code generated in both, 10k": fx_one
        / times["graphq and code", RULES][10_000],
    }
    least = dict(zip(list(figures)[1:6], (1, 1, 20, 20, 20), strict=True))
    for name, value in figures.items():
        print(f"{name}: {value:.2f}")
    if options.json:
        options.json.write_text(
            json.dumps({"seconds": {f"{w} {k}": v for (w, k), v in times.items()}, **figures}, indent=2)
        )
    bad = ["growth exponent over 1.1"] if figures["growth exponent"] > 1.1 else []
    bad += [f"{name} under {wanted}" for name, wanted in least.items() if figures[name] < wanted]
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
