"""graphq lint: what is wrong with a quantized ONNX model, of any tool."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import onnx
import typer
from rich.console import Console
from rich.table import Table

from graphq.errors import ExportError
from graphq.evaluate.taps import load_model
from graphq.lint import Finding, lint
from graphq.lint import fix as fix_model
from graphq.passes.targets import get_target

console = Console()


def lint_command(
    model: Annotated[Path, typer.Argument(help="A quantized ONNX model")],
    fix: Annotated[Path | None, typer.Option(help="Write a repaired copy here")] = None,
    target: Annotated[str, typer.Option(help="onnxruntime or tensorrt")] = "onnxruntime",
    cpu: Annotated[str, typer.Option(help="auto, avx2 (x86 without VNNI), vnni or arm")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Find what a runtime will not fuse, gets wrong, or does for nothing; exit with 1 where something is left."""
    loaded = load_model(model)
    saturates = target == "onnxruntime" and get_target("onnxruntime", cpu=cpu).saturates
    found = lint(loaded, target, saturates=saturates)
    left = found
    if fix is not None:
        repaired, left = fix_model(loaded, target, saturates=saturates)
        _write(repaired, fix)
    if as_json:
        print(json.dumps({"found": [f.to_dict() for f in found], "left": [f.to_dict() for f in left]}, indent=2))
    else:
        console.print(findings_table(found, left) if found else f"{model}: nothing found")
        if fix is not None:
            console.print(f"wrote {fix}: {len(found) - len(left)} repaired, the same bits with the optimizer off")
    if left:
        raise typer.Exit(1)


def findings_table(found: list[Finding], left: list[Finding]) -> Table:
    """A row for each finding; what `fix` has repaired is marked."""
    table = Table("rule", "node", "what happens", "what to do")
    for f in found:
        table.add_row(f.rule, f.node, f.consequence, f.remedy if f in left else "[green]repaired[/green]")
    return table


def _write(model: onnx.ModelProto, path: Path) -> None:
    if not path.parent.is_dir():
        raise ExportError("the folder does not exist", where=str(path.parent), remedy="Make it first.")
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / path.name
            onnx.save(model, part)
            os.replace(part, path)
    except OSError as e:
        raise ExportError(
            f"the model could not be written: {e.strerror or e}", where=str(path), remedy="Free space, or another path."
        ) from e
