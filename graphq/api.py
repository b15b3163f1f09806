"""capture → prepare → calibrate → convert → export, each a function from a graph to a graph."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from graphq.algorithms.base import check_arguments
from graphq.calibration.batches import NO_DATA, batches_of
from graphq.calibration.calibrate import calibrate_graphs
from graphq.config import QuantConfig
from graphq.errors import CalibrationError, StateError, TargetError
from graphq.graph.capture import capture as capture_graph
from graphq.graph.capture import example_of
from graphq.graph.fork import fork
from graphq.graph.garbage import uncollected
from graphq.graph.invariants import check_stage, decided
from graphq.graph.on_disk import on_disk
from graphq.graph.passes import Pipeline
from graphq.graph.view import parameter, read_all
from graphq.nn import first_call, with_registered
from graphq.passes.canonical import canonical_pipeline
from graphq.passes.placement import (
    annotate,
    fit_bias,
    guard_saturation,
    insert_quantizers,
    open_attention,
    open_lstm,
    quantize_bias,
    to_qdq,
)
from graphq.passes.targets import Target, get_target
from graphq.qat import FOLDED, TRAINED, settle
from graphq.quantizer import quantizers

STAGE = "graphq_stage"
Model = nn.Module | fx.GraphModule | ExportedProgram
Graphs = dict[str, fx.GraphModule]  # by target
Config = QuantConfig | str | Path
Args = tuple[Any, ...]
Kwargs = dict[str, Any] | None
Prepared = TypeVar("Prepared", fx.GraphModule, Graphs)


def stage_of(gm: Any) -> str:
    """captured, prepared, calibrated or converted; "" for what graphq has not made."""
    return gm.meta.get(STAGE, "") if isinstance(gm, fx.GraphModule) else ""


def _expect(gm: Any, stage: str, caller: str, remedy: str) -> None:
    found = stage_of(gm)
    if found != stage:
        what = f"a graph that is {found}" if found else f"a {type(gm).__name__}"
        raise StateError(f"{caller} takes a graph that is {stage}, and got {what}", remedy=remedy)


def capture(
    model: Model,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = "batch",
    *,
    inplace: bool = False,
) -> fx.GraphModule:
    gm = capture_graph(model, args, kwargs, dynamic_shapes, inplace=inplace)
    gm.meta.setdefault(STAGE, "captured")
    return gm


capture.__doc__ = capture_graph.__doc__


def capture_like(model: Model, graph: fx.GraphModule) -> fx.GraphModule:
    """Capture a model with the example inputs and dynamic shapes of a graph made from it before."""
    example = example_of(graph)
    return capture(model, example.args, example.kwargs, example.dynamic_shapes)


@overload
def prepare(
    model: Model, config: Config = ..., args: Args = ..., kwargs: Kwargs = ..., *, target: Target | str = ...,
    dynamic_shapes: Any = ..., canonical: Pipeline | None = ...,
) -> fx.GraphModule: ...  # fmt: skip
@overload
def prepare(
    model: Model, config: Config = ..., args: Args = ..., kwargs: Kwargs = ..., *, target: Sequence[Target | str],
    dynamic_shapes: Any = ..., canonical: Pipeline | None = ...,
) -> Graphs: ...  # fmt: skip
def prepare(
    model: Model,
    config: Config = "int8",
    args: Args = (),
    kwargs: Kwargs = None,
    *,
    target: Target | str | Sequence[Target | str] = "onnxruntime",
    dynamic_shapes: Any = "batch",
    canonical: Pipeline | None = None,
) -> fx.GraphModule | Graphs:
    """Capture a model, decide on every op, and place quantizers; it still computes what the float model does.

    config: a QuantConfig, a preset name, or a YAML or JSON file. args, kwargs, dynamic_shapes: see `capture`.
    target: a Target, or the name of one; `get_target("onnxruntime", cpu="avx2")` is for another machine. A list of them
        gives a graph for each, by name; calibrate, convert and export take these together.
    canonical: the rewrites to begin with, `canonical_pipeline().after("fold_pad", …)`; None: the built-in ones.
    """
    if stage_of(model) in ("prepared", "calibrated", "converted"):
        raise StateError(
            f"this graph is {stage_of(model)} already", remedy="Prepare the float model again for another config."
        )
    config = QuantConfig.load(config)
    for a in config.algorithms:
        check_arguments(a.name, a.args)
    targets = [get_target(t) for t in (target if isinstance(target, (list, tuple)) else [target])]  # type: ignore[arg-type]
    captured = capture(with_registered(model), args, kwargs, dynamic_shapes)  # type: ignore[arg-type]
    _expect_float32(captured)
    canonical = canonical or canonical_pipeline()
    with uncollected():
        gm = fork(captured)
        canonical(gm)
        others = [fork(gm) for _ in targets[1:]]
        graphs = [gm, *others]
        for what, open_parts in (("attention", open_attention), ("LSTMs", open_lstm)):
            if len({open_parts(g, config, t) for g, t in zip(graphs, targets, strict=True)}) > 1:
                raise TargetError(
                    f"not all of these targets quantize {what} in parts, and one calibration is for one graph",
                    where=", ".join(t.name for t in targets),
                    remedy=f"Prepare the model for each by itself, or leave {what} float.",
                )
        graphs = [_place(g, config, t) for g, t in zip(graphs, targets, strict=True)]
    for g in graphs:
        g.meta["graphq_canonical"] = canonical
        if not quantizers(g):
            warnings.warn(f"{config.name!r} quantizes nothing in this model; graphq.explain says why", stacklevel=2)
        if any(on_disk(p) for p in g.parameters()):
            g.register_forward_pre_hook(_expect_values)
    if not isinstance(target, (list, tuple)):
        return graphs[0]
    return dict(zip(names_of(targets), graphs, strict=True))


def _place(gm: fx.GraphModule, config: QuantConfig, target: Target) -> fx.GraphModule:
    annotate(gm, config, target)
    check_stage(gm, decided, after="annotate")
    insert_quantizers(gm)
    check_stage(gm, after="insert_quantizers")
    gm.meta.update({STAGE: "prepared", "graphq_config": config, "graphq_target": target})
    return gm


def _expect_values(gm: nn.Module, _: Any) -> None:
    if any(on_disk(p) for p in gm.parameters()):
        raise StateError("the weights of this graph are on disk, and it would compute NaN",
                         remedy="graphq.fold_weights(graph) and graphq.convert(graph) read them.")  # fmt: skip


def names_of(targets: Sequence[Target]) -> list[str]:
    """Each target's name, with its CPU where a name comes twice. Raises TargetError for one that is given twice."""
    names = [t.name for t in targets]
    names = [n if names.count(n) == 1 else f"{n}-{t.cpu}" for n, t in zip(names, targets, strict=True)]
    if not names or len(set(names)) < len(names):
        raise TargetError(
            f"targets are given once each, not {', '.join(names) or 'none'}", remedy="Name different targets or CPUs."
        )
    return names


def _expect_float32(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        value = node.meta.get("val") if node.op == "placeholder" else parameter(gm, node)
        if not isinstance(value, Tensor) or (node.op == "get_attr" and value.numel() < 2):
            continue
        if value.is_floating_point() and value.dtype != torch.float32:
            raise TargetError(
                f"the model computes in {value.dtype}, the scales and kernels in float32",
                where=f"input {node.target}" if node.op == "placeholder" else str(node.target),
                remedy="Quantize model.float() on float32 inputs.",
            )


def calibrate(
    prepared: Prepared,
    data: Any,
    *,
    progress: bool = True,
    store: str | Path | None = None,
    frontier: Literal["memory", "disk"] = "memory",
) -> Prepared:
    """Show data to the observers and fix all scales; afterwards the graph simulates the quantized model.

    prepared: a graph, or the graphs of several targets; the data run once.
    data: an iterable of tensors, tuples or dicts (a DataLoader is one), or a callable that runs the model it is given.
    store: a folder in which weights are kept that algorithms choose layer by layer (gptq, rtn) or block by block
        (autoround). A run that was stopped goes on from there, and a model that is on disk (`from_disk`) needs memory
        for one weight, or block, at a time.
    frontier: where the samples are kept between two layers meanwhile: in memory, or in the store's folder.
    """
    graphs = _each(prepared)
    for gm in graphs:
        _expect(gm, "prepared", "calibrate", "Call graphq.prepare first; calibration changes weights and biases.")
    calibrate_graphs(graphs, data, progress=progress, store=store, frontier=frontier)
    for gm in graphs:
        gm.meta[STAGE] = "calibrated"
    return prepared


def _each(graphs: Any) -> list[fx.GraphModule]:
    """One graph, or those of several targets."""
    return [*graphs.values()] if isinstance(graphs, dict) else [graphs]


def _after_training(trained: fx.GraphModule) -> fx.GraphModule:
    """Weights and biases have moved since calibration, and must fit the kernels again."""
    gm = settle(trained)
    fit_bias(gm)
    if gm.meta["graphq_target"].saturates:
        guard_saturation(gm)
    return gm


def convert(calibrated: Prepared) -> Prepared:
    """Replace quantizers by graphq::quantize and graphq::dequantize, weights and biases by integer codes.

    A new graph, or one for each of several; the calibrated ones stay as they are.
    """
    converted = [_convert(gm) for gm in _each(calibrated)]
    many: Any = calibrated
    return dict(zip(many, converted, strict=True)) if isinstance(many, dict) else converted[0]  # type: ignore[return-value]


@uncollected()
def _convert(calibrated: fx.GraphModule) -> fx.GraphModule:
    _expect(calibrated, "calibrated", "convert", "Call graphq.prepare and graphq.calibrate first.")
    if FOLDED in calibrated.meta:
        raise StateError(
            "the weights of this graph are folded: their codes and float values are gone",
            remedy="Convert the calibrated graph that was folded; fold_weights gave a copy.",
        )
    gm = _after_training(calibrated) if TRAINED in calibrated.meta else fork(calibrated)
    read_all(gm)
    quantize_bias(gm)
    to_qdq(gm)
    check_stage(gm, after="to_qdq")
    gm.meta[STAGE] = "converted"
    return gm


@overload
def export(graph: fx.GraphModule, path: str | Path) -> Path: ...
@overload
def export(graph: Graphs, path: str | Path) -> dict[str, Path]: ...
def export(graph: fx.GraphModule | Graphs, path: str | Path) -> Path | dict[str, Path]:
    """Lower a converted graph to its target's form and write it: an ONNX model, or for "torch_compile" a .pt2 program.

    A captured graph is written too, as the float model to compare with. The graphs of several targets become
    model.onnxruntime.onnx, model.tensorrt.onnx, … for the path model.onnx.
    """
    from graphq.export.onnx import export_onnx, metadata_of, name_nodes  # onnxscript takes 60 MB and half a second:
    from graphq.export.program import export_program  # they are for those who export

    if isinstance(graph, dict):
        suffixes = {name: f".{name}{gm.meta['graphq_target'].suffix}" for name, gm in graph.items()}
        return {name: export(gm, Path(path).with_suffix(suffixes[name])) for name, gm in graph.items()}
    if stage_of(graph) == "captured" and Path(path).suffix == ".pt2":
        return export_program(fork(graph), path)
    if stage_of(graph) == "captured":
        return export_onnx(name_nodes(fork(graph)), path, {"graphq.config": "float"})
    _expect(graph, "converted", "export", "Call graphq.convert on the calibrated graph first.")
    target: Target = graph.meta["graphq_target"]
    if target.suffix == ".pt2":
        return export_program(target.lowering(graph), path)
    return export_onnx(target.lowering(graph), path, metadata_of(graph), target.translations)


@overload
def quantize(
    model: Model, config: Config = ..., data: Any = ..., *, args: Args = ..., kwargs: Kwargs = ...,
    target: Target | str = ..., dynamic_shapes: Any = ..., progress: bool = ..., store: str | Path | None = ...,
) -> fx.GraphModule: ...  # fmt: skip
@overload
def quantize(
    model: Model, config: Config = ..., data: Any = ..., *, args: Args = ..., kwargs: Kwargs = ...,
    target: Sequence[Target | str], dynamic_shapes: Any = ..., progress: bool = ..., store: str | Path | None = ...,
) -> Graphs: ...  # fmt: skip
def quantize(
    model: Model,
    config: Config = "int8",
    data: Any = None,
    *,
    args: Args = (),
    kwargs: Kwargs = None,
    target: Target | str | Sequence[Target | str] = "onnxruntime",
    dynamic_shapes: Any = "batch",
    progress: bool = True,
    store: str | Path | None = None,
) -> fx.GraphModule | Graphs:
    """prepare, calibrate and convert in one call. Without args and kwargs, the first batch of data is the example.
    store: see `calibrate`."""
    if data is None:
        raise CalibrationError("there is no calibration data", remedy=NO_DATA)
    args = (args,) if isinstance(args, Tensor) else args
    if callable(data) and not hasattr(data, "__iter__") and not args and not kwargs:
        args, kwargs = first_call(model, data) if isinstance(model, nn.Module) else ((), {})
        if not args and not kwargs:
            raise CalibrationError(
                "data is a function that does not call the model, so there is no batch to trace it with",
                remedy="Let it run the model that it is given, or give args or kwargs too.",
            )
    if not args and not kwargs and not isinstance(model, ExportedProgram) and not stage_of(model):
        data = list(data) if not hasattr(data, "__len__") else data
        first = next(batches_of(data), None)
        if first is None:
            raise CalibrationError("there is no calibration data: the iterable is empty", remedy=NO_DATA)
        args, kwargs = first
    prepared: Any = prepare(model, config, args, kwargs, target=target, dynamic_shapes=dynamic_shapes)  # type: ignore[call-overload]
    return convert(calibrate(prepared, data, progress=progress, store=store))  # type: ignore[no-any-return]
