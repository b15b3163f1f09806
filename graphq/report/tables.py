"""Terminal tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from graphq.evaluate.compare import Comparison
from graphq.evaluate.latency import Latency
from graphq.evaluate.verify import db
from graphq.report.explain import Explanation


def explanation_table(explanation: Explanation, *, every: bool = False) -> Table:
    """A row per op; shape computations only with `every`."""
    table = Table(title="what was decided, and why", title_justify="left", show_lines=False)
    checked = any(r.found for r in explanation.rows)
    for name in ("layer", "op", "decision", "kernel", *(("found",) if checked else ()), "cost", "reason", "rule"):
        table.add_column(name, overflow="fold")
    for r in explanation.rows:
        if r.action == "skip" and not every:
            continue
        found = [("" if r.agrees else "[red]") + r.found] if checked else []
        colour = {"quantize": "[green]", "fuse": "[green]", "carry": "[green]", "weight_only": "[cyan]"}.get(
            r.action, ""
        )
        table.add_row(
            r.layer or "(model)", r.op, colour + r.action, r.predicted, *found, f"{r.share:.1%}", r.reason, r.rule
        )
    return table


def comparison_table(comparison: Comparison, *, worst: int = 10) -> Table:
    """The output's figures in the title, the worst ops below."""
    title = f"output: SQNR {db(comparison.sqnr)}, cosine {comparison.cosine:.5f}, agreement {comparison.agreement:.3f}"
    if comparison.ops:
        title += f" — the {min(worst, len(comparison.ops))} worst ops:"
    table = Table(title=title, title_justify="left")
    for name in ("layer", "op", "SQNR"):
        table.add_column(name)
    for o in comparison.ops[:worst]:
        table.add_row(o.layer or "(model)", o.op, db(o.sqnr))
    return table


def latency_table(latencies: Sequence[Latency]) -> Table:
    """A row per model."""
    table = Table()
    for name in ("model", "median", "minimum", "speed-up"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for m in latencies:
        table.add_row(m.name, f"{m.median_ms:.2f} ms", f"{m.min_ms:.2f} ms", f"{m.speedup:.2f}×")
    return table
