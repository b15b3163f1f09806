"""How fast rules are matched: graphq against torch.fx and Inductor on the same graphs, in one run.

    python benchmarks/matching.py [--rounds 3] [--json out.json] [--check]

Graphs are chains of ATen ops in which every fifth node ends a place that a rule rewrites. graphq carries 60 rules, the
first 20 of which fit there; Inductor carries the one rule that is applied, in its fastest form (a graph pattern with a
handler that builds the node). torch.fx has no sets of rules: `replace_pattern` is called with that one rule, and, for
what the same rules cost, with each of the 41 that differ. Recompiling the graph once is part of every figure.

--check exits with 1 where a figure of the acceptance list fails: growth exponent ≤ 1.1; faster than Inductor at 50k
nodes; ≥ 20 × torch.fx at 10k with the same rules.
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

from graphq.authoring import Rewrite, RewritePass

aten = torch.ops.aten
SIZES = (5_000, 10_000, 20_000, 50_000)
FILLER = (aten.neg.default, aten.abs.default, aten.sin.default)
RULES = 60
FITTING = 20


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


OTHERS = ("exp", "erf", "tanh", "silu", "gelu", "sqrt", "rsqrt", "hardswish", "hardtanh", "elu")


def expression(number: int):
    """What rule `number` looks for, on ATen ops: 0 … 19 sigmoid(relu(x)), the others something that is nowhere."""
    inner = aten.relu.default if number < FITTING else getattr(aten, OTHERS[number % len(OTHERS)]).default

    def pattern(x):
        y = aten.sigmoid.default(inner(x))
        return y if number < FITTING else aten.mul.Tensor(y, float(number))

    return pattern


def make_rule(number: int) -> type[Rewrite]:
    """The same as a rule of graphq."""
    inner = aten.relu.default if number < FITTING else getattr(aten, OTHERS[number % len(OTHERS)]).default

    def pattern(op, x):
        y = op.sigmoid(op.aten(inner)(x))
        return y if number < FITTING else y * float(number)

    def rewrite(m):
        return m.call(aten.hardsigmoid.default, m.x)

    return type(f"Rule{number}", (Rewrite,), {"pattern": staticmethod(pattern), "rewrite": staticmethod(rewrite)})


def time_graphq(nodes: int) -> float:
    gm = chain(nodes)
    passes = RewritePass(*(make_rule(n) for n in range(RULES)))
    start = time.process_time()
    result = passes(gm)
    gm.recompile()
    seconds = time.process_time() - start
    assert result.changed == nodes // 5, result.changed
    return seconds


def time_inductor(nodes: int) -> float:
    gm = chain(nodes)
    passes = PatternMatcherPass()
    pattern = CallFunction(aten.sigmoid.default, CallFunction(aten.relu.default, KeywordArg("x")))

    @register_graph_pattern(pattern, pass_dict=passes)
    def rewrite(match, x):
        node = match.output_node()
        with node.graph.inserting_before(node):
            new = node.graph.call_function(aten.hardsigmoid.default, (x,))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        match.erase_nodes()

    start = time.process_time()
    count = passes.apply(gm.graph)
    gm.recompile()
    seconds = time.process_time() - start
    assert count == nodes // 5, count
    return seconds


def time_fx(nodes: int, rules: int) -> float:
    gm = chain(nodes)

    def replacement(x):
        return aten.hardsigmoid.default(x)

    start = time.process_time()
    changed = [len(fx.replace_pattern(gm, expression(n), replacement)) for n in range(RULES - rules, RULES)]
    changed += [len(fx.replace_pattern(gm, expression(0), replacement))]
    seconds = time.process_time() - start
    assert changed[-1] == nodes // 5 or rules > RULES - FITTING, changed
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
    samples: dict[str, dict[int, list[float]]] = {"graphq": {}, "inductor": {}, "torch.fx": {}}
    for _ in range(options.rounds):
        for n in SIZES:
            samples["graphq"].setdefault(n, []).append(time_graphq(n))
            samples["inductor"].setdefault(n, []).append(time_inductor(n))
    samples["torch.fx"] = {n: [time_fx(n, 0)] for n in SIZES[:2]}
    same_rules = time_fx(10_000, RULES - FITTING)
    times = {who: {n: min(t) for n, t in rows.items()} for who, rows in samples.items()}
    title = "cpu seconds, a fifth of the nodes rewritten"
    table = Table("matcher", "rules", *(f"{n // 1000}k" for n in SIZES), "exponent", title=title)
    for who, rows in times.items():
        cells = [f"{rows[n]:.2f}" if n in rows else "" for n in SIZES]
        table.add_row(who, str(RULES if who == "graphq" else 1), *cells, f"{exponent(rows):.2f}")
    table.add_row("torch.fx", str(RULES - FITTING + 1), "", f"{same_rules:.2f}", "", "", "")
    Console(width=120).print(table)
    ours = times["graphq"]
    figures = {
        "exponent": exponent(ours),
        "inductor over graphq at 50k": times["inductor"][50_000] / ours[50_000],
        "torch.fx over graphq at 10k, same rules": same_rules / ours[10_000],
        "torch.fx over graphq at 10k, one rule against 60": times["torch.fx"][10_000] / ours[10_000],
    }
    for name, value in figures.items():
        print(f"{name}: {value:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": times, **figures}, indent=2))
    bad = [
        *(["growth exponent over 1.1"] if figures["exponent"] > 1.1 else []),
        *(["slower than Inductor at 50k"] if figures["inductor over graphq at 50k"] < 1 else []),
        *(["less than 20 × torch.fx at 10k"] if figures["torch.fx over graphq at 10k, same rules"] < 20 else []),
    ]
    for line in bad:
        print("does not hold:", line)
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
