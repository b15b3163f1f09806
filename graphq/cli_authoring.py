"""The workbench of pass authors: graphq match | trace | passes | new-pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import fx

from graphq import api
from graphq.calibration.batches import batches_of
from graphq.config import QuantConfig
from graphq.errors import CalibrationError
from graphq.graph.fork import fork
from graphq.graph.passes import finish
from graphq.loading import load_data, load_model
from graphq.new_pass import write_new_pass
from graphq.passes.canonical import canonical_pipeline
from graphq.passes.placement import annotate, insert_quantizers
from graphq.passes.targets import get_target
from graphq.report.catalog import catalog, catalog_table
from graphq.report.rules import look_for, match_tables, rules_of
from graphq.report.trace import Step, recorded
from graphq.report.trace_page import write_trace

console = Console()

ModelOption = Annotated[str, typer.Option("--model", help="model.pt2, hf:DIR, or module:factory")]
DataOption = Annotated[
    str | None,
    typer.Option("--calibration", help="Example inputs: .npz, folder, .txt, module:loader"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines")]
DynamicOption = Annotated[str, typer.Option(help="batch, batch+sequence, or none")]


def _captured(model: str, data: str | None, dynamic: str) -> tuple[fx.GraphModule, list[Any]]:
    """(the graph, batches)."""
    source = load_model(model)
    if data is None and not model.endswith(".pt2"):
        raise CalibrationError(
            "tracing needs an example input", where=model, remedy="Give --calibration, or a .pt2 file."
        )
    batches = load_data(data, model, samples=4) if data is not None else []
    args, kwargs = next(batches_of(batches), ((), {}))
    return api.capture(source, args, kwargs, None if dynamic == "none" else dynamic), batches


def match(
    rule: Annotated[Path, typer.Argument(help="A Python file with Rewrites or QuantPatterns")],
    model: ModelOption,
    calibration: DataOption = None,
    dynamic: DynamicOption = "batch",
    raw: Annotated[bool, typer.Option("--raw", help="Look in the captured graph, before the canonical passes")] = False,
    misses: Annotated[int, typer.Option(help="How many near misses to show for each rule")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Show where the rules of a file match in a model, and what stopped them where they nearly do."""
    rules = rules_of(rule)
    gm = fork(_captured(model, calibration, dynamic)[0])
    if not raw:
        canonical_pipeline()(gm)
    reports = look_for(rules, gm, misses=misses)
    if as_json:
        print(json.dumps([r.to_dict() for r in reports], indent=2))
    else:
        console.print(match_tables(reports))


def trace(
    model: Annotated[str, typer.Argument(help="model.pt2, hf:DIR, or module:factory")],
    calibration: DataOption = None,
    passes: Annotated[bool, typer.Option("--passes", help="Write what every pass changed, into --out")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for the diffs and index.html")] = Path("trace"),
    config: Annotated[str, typer.Option("--config", help="A preset, or a .yaml or .json file")] = "int8",
    target: Annotated[str, typer.Option(help="The runtime to place quantizers for")] = "onnxruntime",
    dynamic: DynamicOption = "batch",
) -> None:
    """Show in how many places every pass changes a model; with --passes also write what it changed, as text and as one
    page that steps through the passes with drawings."""
    place = get_target(target)
    settings = QuantConfig.load(config)
    graph, batches = _captured(model, calibration, dynamic)
    steps = traced_steps(graph, settings, place, batches)
    for step in steps:
        console.print(f"{step.name:26} {len(step.before):6} → {len(step.after):<6} nodes, {len(step.places)} places")
    if passes:
        page = write_trace(steps, out, f"{model}, {settings.name} for {place.name}")
        console.print(f"wrote {page}")


def traced_steps(graph: fx.GraphModule, config: QuantConfig, target: Any, batches: list[Any]) -> list[Step]:
    """Canonical passes, placement and, with data, conversion and lowering, each recorded."""
    gm = fork(graph)
    steps = []
    for step in canonical_pipeline().passes:
        doc = "\n".join(r.__doc__ or "" for r in getattr(step, "rules", (step,)))
        steps.append(recorded(step.name, doc, gm, lambda step=step: step(gm) and None)[0])  # type: ignore[misc]
    finish(gm)
    annotate(gm, config, target)
    steps.append(recorded("insert_quantizers", insert_quantizers.__doc__ or "", gm, lambda: insert_quantizers(gm))[0])
    if not batches:
        return steps
    prepared = api.calibrate(api.prepare(graph, config, target=target), batches, progress=False)
    step, converted = recorded("convert", api.convert.__doc__ or "", prepared, lambda: api.convert(prepared))
    lowering = target.lowering
    lowered, _ = recorded(lowering.__name__, lowering.__doc__ or "", converted, lambda: lowering(converted))
    return [*steps, step, lowered]


def passes(
    target: Annotated[str, typer.Option(help="The runtime whose passes to list")] = "onnxruntime",
    as_json: JsonOption = False,
) -> None:
    """List every pass in the order in which it runs, with what it turns into what; plug-ins are among them."""
    entries = catalog(get_target(target))
    if as_json:
        print(json.dumps([e.to_dict() for e in entries], indent=2, ensure_ascii=False))
    else:
        console.print(catalog_table(entries))


def new_pass(
    name: Annotated[str, typer.Argument(help="Name of the rule's file, in lower case: fold_scale_into_linear")],
    folder: Annotated[Path, typer.Option(help="Where to write it")] = Path("."),
) -> None:
    """Write the file of a new rule and its test."""
    rule, test = write_new_pass(name, folder)
    console.print(f"wrote {rule} and {test}; run them with `pytest {test}`")
