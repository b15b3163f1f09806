"""The trace of all passes as files: a diff a pass, and one page, on its own, that steps through them."""

from __future__ import annotations

import html
import os
from pathlib import Path

from graphq.report.drawing import draw
from graphq.report.trace import Place, Step

LISTED = 60  # places of one kind that are listed by their module paths
ASSETS = Path(__file__).parent / "assets"


def write_trace(steps: list[Step], folder: Path, title: str) -> Path:
    """Write NN-pass.diff for every pass and index.html; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps):
        _write(folder / f"{number:02}-{step.name}.diff", step.text)
    page = folder / "index.html"
    _write(page, trace_page(steps, title))
    return page


def _write(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def trace_page(steps: list[Step], title: str) -> str:
    """The page: passes on the left, what the chosen one changed on the right."""
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("trace.css", "trace.js"))
    buttons = "".join(map(_button, steps))
    sections = "".join(f"<section>{_section(s)}</section>" for s in steps)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{style}</style>"
        f"<nav><b>{html.escape(title)}</b><p>arrow keys step through the passes</p>{buttons}</nav>"
        f"<main>{sections}</main><script>{script}</script></html>"
    )


def _button(step: Step) -> str:
    count = len(step.places)
    return f'<button class="{"" if count else "none"}">{html.escape(step.name)} <small>{count or "–"}</small></button>'


def _section(step: Step) -> str:
    head = (
        f"<h2>{html.escape(step.name)}</h2><p class=doc>{html.escape(step.doc)}</p>"
        f"<p>{len(step.before)} → {len(step.after)} nodes, {len(step.places)} places changed</p>"
    )
    return head + "".join(_group(step, group) for group in step.groups)


def _group(step: Step, alike: list[Place]) -> str:
    first = alike[0]
    where = ", ".join(p.where for p in alike[:LISTED]) + (" …" if len(alike) > LISTED else "")
    sides = (("before", draw(first, step.before, gone=True)), ("after", draw(first, step.after, gone=False)))
    drawings = "".join(f"<div><h4>{name}</h4>{svg}</div>" for name, svg in sides)
    lines = "".join(
        f'<span class="{"minus" if line.startswith("-") else "plus"}">{html.escape(line)}</span>\n'
        for line in first.text.splitlines()
    )
    times = f" (×{len(alike)})" if len(alike) > 1 else ""
    every = f"<details><summary>all {len(alike)} places</summary>{html.escape(where)}</details>"
    head = f"<h3>{html.escape(first.where)}{times}</h3>"
    return f"{head}<div class=pair>{drawings}</div><pre>{lines}</pre>{every if len(alike) > 1 else ''}"
