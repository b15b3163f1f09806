"""graphq export | verify | bench: files of a saved graph, what a runtime makes of them, and how fast they are there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import fx

from graphq import api, storage
from graphq.cli_json import emit
from graphq.errors import StateError
from graphq.evaluate.latency import check_runtime, measure, random_feed, runtime_of
from graphq.evaluate.verify import verify
from graphq.loading import load_data, load_model
from graphq.report.tables import latency_table

console = Console()

ModelArg = Annotated[str, typer.Argument(help="model.pt2, hf:DIR, or module:factory: what was quantized")]
GraphArg = Annotated[Path, typer.Argument(help="The folder that `graphq quantize --save` wrote")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines")]


def save(graphs: dict[str, fx.GraphModule], folder: Path) -> None:
    """A folder for the graph, or one in it for every target."""
    for name, graph in graphs.items():
        storage.save(graph, folder if len(graphs) == 1 else folder / name)


def _load(model: str, folder: Path) -> fx.GraphModule:
    graph = storage.load(folder, load_model(model))
    stage = api.stage_of(graph)
    if stage == "calibrated":
        return api.convert(graph)
    if stage != "converted":
        raise StateError(f"the saved graph is {stage}", where=str(folder), remedy="Calibrate it first.")
    return graph


def export_command(
    model: ModelArg,
    graph: GraphArg,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write: .onnx, or .pt2")],
) -> None:
    """Write a saved graph in its target's form again, without calibrating anew."""
    path = api.export(_load(model, graph), output)
    console.print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def verify_command(
    model: ModelArg,
    graph: GraphArg,
    file: Annotated[Path, typer.Argument(help="The exported file")],
    data: Annotated[str, typer.Option("--data", help=".npz, folder of images, .txt, or module:loader")],
    samples: Annotated[int, typer.Option(help="How many samples to run")] = 8,
    as_json: JsonOption = False,
) -> None:
    """Say whether the runtime computes what was simulated, op by op and end to end; exit with 1 where it does not."""
    result = verify(_load(model, graph), file, load_data(data, model, samples=samples))
    if as_json:
        emit(result.to_dict())
    else:
        console.print(str(result))
    if not result.agrees:
        raise typer.Exit(1)


def bench_command(
    files: Annotated[list[Path], typer.Argument(help="Quantized files, .onnx or .pt2")],
    floats: Annotated[list[Path], typer.Option("--float", help="The float model, once for each kind of file")],
    targets: Annotated[
        list[str],
        typer.Option("--targets", help="Time ONNX files there instead of where they were made for; may be repeated"),
    ] = [],  # noqa: B006  (typer copies it)
    batch: Annotated[list[int], typer.Option(help="Batch sizes")] = [1, 8],  # noqa: B006
    sequence: Annotated[int, typer.Option(help="Size of further dynamic dimensions")] = 128,
    rounds: Annotated[int, typer.Option(help="Interleaved repetitions")] = 15,
    as_json: JsonOption = False,
) -> None:
    """Measure the latency of quantized files against the float model in the same runtime, interleaved."""
    by_suffix = {f.suffix: f for f in floats}
    if len(by_suffix) < len(floats):
        raise StateError("two float files are of one kind", where=str(floats[-1]), remedy="One for each kind of file.")
    groups: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix not in by_suffix:
            raise StateError(f"there is no float {file.suffix} file", where=str(file), remedy="Give it with --float.")
        elsewhere = targets if file.suffix == ".onnx" else []
        for runtime in [check_runtime(t, str(file)) for t in elsewhere] or [runtime_of(file)]:
            groups.setdefault(runtime, []).append(file)
    results: list[dict[str, Any]] = []
    for runtime, members in groups.items():
        base = by_suffix[members[0].suffix]
        for size in batch:
            feed = random_feed(base, batch=size, sequence=sequence)
            named: dict[str, str | Path] = {"fp32": base, **{_label(f, members): f for f in members}}
            timed = measure(named, feed, rounds=rounds, runtime=runtime)
            results.append({"runtime": runtime, "batch": size, "latency": [vars(m) for m in timed]})
            if not as_json:
                console.print(f"{runtime}, batch {size}")
                console.print(latency_table(timed))
    if as_json:
        emit(results)


def _label(file: Path, others: list[Path]) -> str:
    """The name of a file, with its folder where another has that name."""
    return file.name if sum(f.name == file.name for f in others) == 1 else str(file)
