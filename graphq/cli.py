"""The command line: graphq quantize | explain | compare | presets | schema here, the rest in the cli_ files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

from graphq import api, cli_authoring, cli_eval, cli_lint, cli_targets
from graphq.cli_json import emit
from graphq.config import QuantConfig
from graphq.config.known import KNOWN_CONFIGS
from graphq.config.presets import CONFIGS
from graphq.config.spec import QuantSpec
from graphq.errors import ExportError, GraphqError, StateError, TargetError, did_you_mean
from graphq.evaluate.compare import Comparison, OutputMetrics
from graphq.evaluate.compare import compare as compare_graphs
from graphq.evaluate.taps import load_model as load_onnx
from graphq.evaluate.taps import session
from graphq.evaluate.verify import feed_of, flat_outputs, verify
from graphq.graph.devices import device_of, moved
from graphq.graph.invariants import checking
from graphq.loading import load_data, load_model
from graphq.passes.targets import Target, get_target, options_of
from graphq.report.explain import explain as explain_graph
from graphq.report.html import report
from graphq.report.tables import comparison_table, explanation_table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize PyTorch models on their graph; see what was decided and what really runs.",
)
console = Console()

ModelArg = Annotated[str, typer.Argument(help="model.pt2, hf:DIR, or module:factory")]
DataOption = Annotated[str, typer.Option("--calibration", help=".npz, folder of images, .txt, or module:loader")]
ConfigOption = Annotated[str, typer.Option("--config", help="A preset, or a .yaml or .json file")]
TargetOption = Annotated[str, typer.Option(help="The runtime to place quantizers for")]
TargetsOption = Annotated[
    list[str], typer.Option("--target", help="The runtime to place quantizers for; may be repeated")
]
OptionOption = Annotated[
    list[str],
    typer.Option("--option", help="Of the target, key=value: form=qoperator, accuracy_level=0; may be repeated"),
]
CpuOption = Annotated[str, typer.Option(help="auto (this machine), avx2, vnni or arm")]
DynamicOption = Annotated[str, typer.Option(help="batch, batch+sequence, or none")]
SamplesOption = Annotated[int, typer.Option(help="How many calibration samples to use")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines")]


def _shapes(dynamic: str) -> str | None:
    return None if dynamic == "none" else dynamic


@app.command()
def quantize(
    model: ModelArg,
    calibration: DataOption,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write: .onnx, or .pt2")],
    config: ConfigOption = "int8",
    target: TargetsOption = ["onnxruntime"],  # noqa: B006  (typer copies it)
    cpu: CpuOption = "auto",
    option: OptionOption = [],  # noqa: B006
    dynamic: DynamicOption = "batch",
    samples: SamplesOption = 64,
    float_onnx: Annotated[Path | None, typer.Option(help="Also write the float model here")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML report here")] = None,
    save: Annotated[Path | None, typer.Option(help="Also keep the graph, in this folder")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Keep chosen weights in this folder; a run that was stopped goes on from there")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Check the graph and every promise after every pass")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a model, write it as ONNX, and check that the runtime computes what was simulated.

    Several targets share one calibration; model.onnx becomes model.onnxruntime.onnx, model.tensorrt.onnx, …
    """
    settings, places = QuantConfig.load(config), _targets(target, cpu, option)
    if store is not None and len(places) > 1:
        raise StateError("a store is for one target", where="--store", remedy="Name one --target.")
    for path in filter(None, (output, float_onnx, html, save)):
        if not path.parent.is_dir():
            raise ExportError("the folder does not exist", where=str(path.parent), remedy="Make it first.")
    source = load_model(model)
    data = load_data(calibration, model, samples=samples)
    with checking(check):
        graphs = api.quantize(
            source, settings, data, target=places, dynamic_shapes=_shapes(dynamic), progress=not as_json, store=store
        )
        files = api.export(graphs, output) if len(graphs) > 1 else {n: api.export(g, output) for n, g in graphs.items()}
    if float_onnx is not None:
        api.export(api.capture_like(source, next(iter(graphs.values()))), float_onnx)
    if save is not None:
        cli_targets.save(graphs, save)
    held = data[:8]
    results, agrees = [], True
    for name, file in files.items():
        checked, explanation = verify(graphs[name], file, held), explain_graph(graphs[name], file)
        quality, place = compare_graphs(source, graphs[name], held, per_op=False), graphs[name].meta["graphq_target"]
        agrees &= checked.agrees
        if html is not None:
            page = html if len(files) == 1 else html.with_suffix(f".{name}{html.suffix}")
            report(graphs[name], page, explanation, quality, checked)
        figures = {"kernels": explanation.kernels(), "verify": checked.to_dict(), "quality": quality.to_dict()}
        results.append({"file": str(file), "target": name, **figures})
        if not as_json:
            console.print(_summary(explanation.kernels(), quality, place))
            console.print(str(checked))
            console.print(f"wrote {file} ({file.stat().st_size / 1e6:.1f} MB) for {place.name} ({place.cpu})")
    if as_json:
        emit(results if len(results) > 1 else results[0])
    if not agrees:
        raise typer.Exit(1)


def _targets(names: Sequence[str], cpu: str, options: Sequence[str] = ()) -> list[Target]:
    """Every target with those of the options that it has. Raises TargetError for an option that none has."""
    given: dict[str, Any] = {} if cpu == "auto" else {"cpu": cpu}
    for option in options:
        key, sign, value = option.partition("=")
        if not sign:
            raise TargetError("an option of a target is written key=value", remedy="--option form=qoperator")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise TargetError(f"{value!r} is no value", where=f"--option {option}", remedy="--option key=value") from e
    known = {name: options_of(name) for name in names}
    for key in given:
        if not any(key in k for k in known.values()):
            every = [o for k in known.values() for o in k]
            raise TargetError(
                f"{key!r} is no option of {', '.join(names)}", remedy=did_you_mean(key, every or ["none"])
            )
    return [get_target(n, **{k: v for k, v in given.items() if k in known[n]}) for n in names]


def _summary(kernels: dict[str, int], quality: Comparison, target: Target) -> Table:
    runtimes = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "inductor": "torch.compile"}
    where = f"found in {runtimes[target.executor]}" if target.executor else f"predicted for {target.name}"
    title = f"kernels {where} — SQNR {quality.sqnr:.1f} dB, agreement {quality.agreement:.3f} on calibration samples"
    table = Table("kernel", "ops", title=title, title_justify="left")
    for kernel, count in kernels.items():
        table.add_row(kernel, str(count))
    return table


@app.command()
def explain(
    model: ModelArg,
    calibration: DataOption,
    layer: Annotated[str | None, typer.Option(help="Only this module path")] = None,
    onnx: Annotated[Path | None, typer.Option(help="An exported file: shows the kernels that really run")] = None,
    config: ConfigOption = "int8",
    target: TargetOption = "onnxruntime",
    cpu: CpuOption = "auto",
    option: OptionOption = [],  # noqa: B006
    dynamic: DynamicOption = "batch",
    every: Annotated[bool, typer.Option("--all", help="Also shape computations")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say for every op what is decided, by which rule and why, and which kernel computes it."""
    data = load_data(calibration, model, samples=1)
    [place] = _targets([target], cpu, option)
    graph = api.quantize(load_model(model), config, data, target=place, dynamic_shapes=_shapes(dynamic), progress=False)
    explanation = explain_graph(graph, onnx)
    if layer is not None:
        explanation.rows = explanation[layer]
    if as_json:
        emit(explanation.to_dicts())
    else:
        console.print(explanation_table(explanation, every=every))
    if explanation.disagreements:
        raise typer.Exit(1)


@app.command()
def compare(
    model: ModelArg,
    onnx: Annotated[Path, typer.Argument(help="The exported ONNX file")],
    data: Annotated[str, typer.Option("--data", help=".npz, folder of images, .txt, or module:loader")],
    dynamic: DynamicOption = "batch",
    samples: SamplesOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Compare an exported file, as ONNX Runtime computes it, with the float model."""
    load_onnx(onnx)
    source = load_model(model)
    batches = load_data(data, model, samples=samples)
    graph = api.capture(source, *_example(batches[0]), _shapes(dynamic))
    run = session(onnx)
    metrics = OutputMetrics()
    for batch in batches:
        args, kwargs = moved(_example(batch), device_of(graph))
        with torch.no_grad():
            expected = [t.cpu() for t in flat_outputs(graph(*args, **kwargs))]
        metrics.add(expected, [torch.from_numpy(o) for o in run.run(None, feed_of(graph, args, kwargs))])
    result = metrics.result()
    if as_json:
        emit(result.to_dict())
    else:
        console.print(comparison_table(result))


def _example(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, dict):
        return (), batch
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


@app.command()
def presets(as_json: JsonOption = False) -> None:
    """List the configs that come with graphq."""
    if as_json:
        emit({name: json.loads(c.model_dump_json()) for name, c in CONFIGS.items()})
        return
    table = Table("preset", "rule", "scheme", "reason")
    for name, config in CONFIGS.items():
        if name.startswith("quark:") and name.removeprefix("quark:") in KNOWN_CONFIGS:
            continue
        for rule in config.rules:
            if rule.scheme is not None or name not in KNOWN_CONFIGS:
                table.add_row(name, str(rule.select), str(rule.scheme or "float"), rule.reason)
    console.print(table)


@app.command()
def schema(
    spec: Annotated[bool, typer.Option("--spec", help="Only the schema of one QuantSpec")] = False,
) -> None:
    """Print the JSON schema of config files."""
    emit((QuantSpec if spec else QuantConfig).model_json_schema())


app.command("match")(cli_authoring.match)
app.command("trace")(cli_authoring.trace)
app.command("passes")(cli_authoring.passes)
app.command("new-pass")(cli_authoring.new_pass)
app.command("lint")(cli_lint.lint_command)
app.command("export")(cli_targets.export_command)
app.command("verify")(cli_targets.verify_command)
app.command("bench")(cli_targets.bench_command)
app.command("eval")(cli_eval.eval_command)


def main() -> None:
    """Entry point: errors that graphq raises on purpose are printed without a traceback, exit status 1."""
    try:
        app()
    except GraphqError as e:
        Console(stderr=True).print(f"[red]{type(e).__name__}[/red]: {e}", markup=True, highlight=False)
        sys.exit(1)
