"""The HTML report: one self-contained page with the figures, the kernels, and a row per op."""

from __future__ import annotations

import html
import os
from pathlib import Path

from torch import fx

from graphq.evaluate.compare import Comparison
from graphq.evaluate.verify import Verification, db
from graphq.report.explain import Explanation

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1c1e21 }
table { border-collapse: collapse; width: 100%; font-size: 13px } td, th { padding: .25rem .6rem; text-align: left;
border-bottom: 1px solid #e2e4e8; vertical-align: top } th { position: sticky; top: 0; background: #fff }
.quantize, .fuse, .carry { color: #0a7d33 } .weight_only { color: #086d8c } .float { color: #8a5a00 }
.bad { background: #ffe3e0 } .figures b { font-size: 1.3rem; display: block } .figures { display: flex; gap: 3rem }
"""


def report(
    gm: fx.GraphModule,
    path: str | Path,
    explanation: Explanation,
    comparison: Comparison | None = None,
    verification: Verification | None = None,
) -> Path:
    """Write the page; what is None is left out."""
    path = Path(path)
    target, config = gm.meta["graphq_target"], gm.meta["graphq_config"]
    parts = [f"<h1>graphq report</h1><p>config {html.escape(config.name)}, target {target.name} ({target.cpu})</p>"]
    if comparison is not None:
        figures = (("SQNR", db(comparison.sqnr)), ("cosine", f"{comparison.cosine:.5f}"),
                   ("agreement", f"{comparison.agreement:.3f}"))  # fmt: skip
        parts.append('<div class="figures">' + "".join(f"<div>{k}<b>{v}</b></div>" for k, v in figures) + "</div>")
    if verification is not None:
        parts.append(f"<p>{html.escape(str(verification))}</p>")
    kernels = "".join(f"<tr><td>{html.escape(k)}</td><td>{v}</td></tr>" for k, v in explanation.kernels().items())
    parts.append(f"<h2>Kernels</h2><table>{kernels}</table>")
    parts.append(f"<h2>What was decided, and why</h2>{_rows(explanation)}")
    page = f"<!doctype html><meta charset=utf-8><title>graphq report</title><style>{STYLE}</style>{''.join(parts)}"
    part = path.with_name(f".{path.name}.part")
    part.write_text(page)
    os.replace(part, path)
    return path


def _rows(explanation: Explanation) -> str:
    names = ("layer", "op", "action", "spec", "predicted", "found", "reason", "rule")
    head = "".join(f"<th>{n}</th>" for n in names)
    body = []
    for r in explanation.rows:
        cells = "".join(
            f"<td class={r.action if n == 'action' else ''!r}>{html.escape(getattr(r, n))}</td>" for n in names
        )
        body.append(f"<tr class={'ok' if r.agrees else 'bad'}>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"
