"""Rules of a file: where they match in a graph, where they nearly do, and how long it takes to find out."""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import fx

from graphq.errors import PassError
from graphq.graph.near_miss import RuleReport, report
from graphq.graph.passes import Rewrite
from graphq.passes.patterns import QuantPattern


@dataclass
class TimedReport:
    """What one rule found, in how many milliseconds."""

    report: RuleReport
    milliseconds: float

    def to_dict(self) -> dict[str, Any]:
        matches = [{"where": m.root.where(), "ops": [n.name for n in m.nodes]} for m in self.report.matches]
        return {
            "rule": self.report.name,
            "milliseconds": self.milliseconds,
            "matches": matches,
            "near_misses": [vars(m) for m in self.report.misses],
        }


def rules_of(path: Path) -> list[Any]:
    """The Rewrites and QuantPatterns that a file defines. Raises PassError if there are none."""
    module = _load(path)
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    found = [v for v in own if issubclass(v, (Rewrite, QuantPattern)) and hasattr(v, "pattern")]
    if not found:
        raise PassError(
            "this file defines no rule", where=str(path), remedy="`graphq new-pass NAME` writes one to begin with."
        )
    return found


def _load(path: Path) -> ModuleType:
    if not path.is_file():
        raise PassError("there is no such file", where=str(path), remedy="`graphq new-pass NAME` writes one.")
    name = f"graphq_rules_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PassError("this is not a Python file", where=str(path), remedy="Name it rule.py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # the file is its author's code
        raise PassError(
            f"the file cannot be loaded: {type(e).__name__}: {e}", where=str(path), remedy="Mend it."
        ) from e
    return module


def look_for(rules: list[Any], gm: fx.GraphModule, *, misses: int = 5) -> list[TimedReport]:
    """Look for every rule in a graph; nothing is changed."""
    results = []
    for rule in rules:
        start = time.perf_counter()
        found = report(gm, rule, misses)
        results.append(TimedReport(found, (time.perf_counter() - start) * 1e3))
    return results


def match_tables(reports: list[TimedReport]) -> Group:
    """A summary, and for every rule its matches and near misses."""
    summary = Table("rule", "matches", "near misses", "ms", title="rules", title_justify="left")
    parts: list[Any] = [summary]
    for r in reports:
        summary.add_row(r.report.name, str(len(r.report.matches)), str(len(r.report.misses)), f"{r.milliseconds:.1f}")
        if r.report.matches:
            table = Table("where", "ops", title=f"{r.report.name} matches", title_justify="left")
            for m in r.report.matches:
                table.add_row(m.root.where(), ", ".join(n.name for n in reversed(m.nodes)))
            parts.append(table)
        if r.report.misses:
            table = Table(
                "where", "ops found", "what stopped it", title=f"{r.report.name} nearly", title_justify="left"
            )
            for miss in r.report.misses:
                table.add_row(miss.where, f"{miss.matched} of {miss.total}", miss.reason)
            parts.append(table)
    return Group(*parts)
