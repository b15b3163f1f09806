"""Every pass that runs between capture and export, with what it turns into what."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from graphq.graph.plugins import plugins_of
from graphq.passes.canonical import canonical_pipeline
from graphq.passes.patterns import PATTERNS, QuantPattern
from graphq.passes.placement import (
    annotate,
    correct_bias,
    fit_bias,
    guard_saturation,
    insert_quantizers,
    quantize_bias,
    to_qdq,
)
from graphq.passes.targets import Target

STAGES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("prepare", (annotate, insert_quantizers)),
    ("calibrate", (fit_bias, guard_saturation, correct_bias)),
    ("convert", (quantize_bias, to_qdq)),
)


@dataclass(frozen=True)
class Entry:
    """One rule or function. runs: the stage, in order. promise: its equivalence class."""

    runs: str
    step: str
    rule: str
    drawing: str
    promise: str
    origin: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def catalog(target: Target) -> list[Entry]:
    """In the order in which they run."""
    entries = []
    for step in canonical_pipeline().passes:
        rules = getattr(step, "rules", ()) or (step,)
        entries += [_entry("canonicalize", step.name, r, getattr(r, "equivalence", step.equivalence)) for r in rules]
    patterns = (*target.patterns, *plugins_of(QuantPattern), *PATTERNS)
    entries += [_entry("annotate", "patterns", p, "") for p in patterns]
    for stage, functions in STAGES:
        entries += [_entry(stage, f.__name__, f, "") for f in functions]
    entries += [_entry(s, f.__name__, f, "") for s, f in (("export", target.lowering), ("verify", target.reference))]
    return entries


def _entry(runs: str, step: str, rule: Any, promise: str) -> Entry:
    doc = (rule.__doc__ or "").strip()
    first = " ".join(doc.split("\n\n")[0].split())
    name = getattr(rule, "__name__", getattr(rule, "name", step))
    module = getattr(rule, "__module__", "graphq")
    return Entry(runs, step, name, first, promise, "graphq" if module.startswith("graphq.") else module.split(".")[0])


def catalog_table(entries: list[Entry]) -> Table:
    """A row per rule; stage and pass are named once."""
    columns = ("stage", "pass", "rule", "before ⇒ after", "promise", "from")
    table = Table(*columns, title="passes, in order", title_justify="left")
    last = ("", "")
    for e in entries:
        stage, step = ("" if e.runs == last[0] else e.runs), ("" if (e.runs, e.step) == last else e.step)
        table.add_row(stage, step, e.rule, e.drawing, e.promise, e.origin)
        last = (e.runs, e.step)
    return table
