"""capture → prepare → calibrate → convert → export, each a function from a graph to a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from graphq.calibration.batches import NO_DATA, batches_of
from graphq.calibration.runner import run_calibration
from graphq.calibration.watch import watching
from graphq.config import QuantConfig
from graphq.errors import CalibrationError, StateError, TargetError
from graphq.export.onnx import export_onnx, metadata_of, name_nodes
from graphq.graph.capture import capture as capture_graph
from graphq.graph.capture import example_of
from graphq.graph.fork import fork
from graphq.graph.garbage import uncollected
from graphq.graph.invariants import check_stage, decided
from graphq.graph.passes import Pipeline
from graphq.graph.view import parameter
from graphq.nn import first_call, with_registered
from graphq.passes.canonical import canonical_pipeline
from graphq.passes.placement import (
    annotate,
    correct_bias,
    fit_bias,
    give_importance,
    guard_saturation,
    importance_watchers,
    insert_quantizers,
    mean_products,
    mean_watchers,
    quantize_bias,
    shared_magnitudes,
    to_qdq,
)
from graphq.passes.targets import Target, get_target
from graphq.qat import FOLDED, TRAINED, settle
from graphq.quantizer import TensorQuantizer, quantizers

STAGE = "graphq_stage"
Model = nn.Module | fx.GraphModule | ExportedProgram


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


def prepare(
    model: Model,
    config: QuantConfig | str | Path = "int8",
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    target: Target | str = "onnxruntime",
    dynamic_shapes: Any = "batch",
    canonical: Pipeline | None = None,
) -> fx.GraphModule:
    """Capture a model, decide on every op, and place quantizers; it still computes what the float model does.

    config: a QuantConfig, a preset name, or a YAML or JSON file. args, kwargs, dynamic_shapes: see `capture`.
    target: a Target, or the name of one; `get_target("onnxruntime", cpu="avx2")` is for another machine.
    canonical: the rewrites to begin with, `canonical_pipeline().after("fold_pad", …)`; None: the built-in ones.
    """
    if stage_of(model) in ("prepared", "calibrated", "converted"):
        raise StateError(
            f"this graph is {stage_of(model)} already", remedy="Prepare the float model again for another config."
        )
    config, target = QuantConfig.load(config), get_target(target)
    captured = capture(with_registered(model), args, kwargs, dynamic_shapes)  # type: ignore[arg-type]
    _expect_float32(captured)
    with uncollected():
        gm = fork(captured)
        canonical = canonical or canonical_pipeline()
        canonical(gm)
        annotate(gm, config, target)
        check_stage(gm, decided, after="annotate")
        insert_quantizers(gm)
        check_stage(gm, after="insert_quantizers")
    kept = {"graphq_config": config, "graphq_target": target, "graphq_canonical": canonical}
    gm.meta.update({STAGE: "prepared", **kept})
    return gm


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


def calibrate(prepared: fx.GraphModule, data: Any, *, progress: bool = True) -> fx.GraphModule:
    """Show data to the observers and fix all scales; afterwards the graph simulates the quantized model.

    data: an iterable of tensors, tuples or dicts (a DataLoader is one), or a callable that runs the model it is given.
    """
    _expect(prepared, "prepared", "calibrate", "Call graphq.prepare first; calibration changes weights and biases.")
    every = quantizers(prepared)
    watchers = mean_watchers(prepared) if prepared.meta["graphq_config"].bias_correction else {}
    for q in every.values():
        q.observe()
    weighing = importance_watchers(prepared)
    try:
        together = not any(q.spec.observer == "moving_average" for q in every.values())
        with watching(prepared, [*watchers.items(), *((n, w) for (n, _), w in weighing.items())]):
            run_calibration(prepared, data, progress=progress, together=together)
        wanted = mean_products(prepared, watchers) if watchers else {}
        give_importance(prepared, weighing)
        _observe_constants(prepared)
        shared = shared_magnitudes(prepared)
        for q in every.values():
            q.freeze(shared.get(q))
    except BaseException:
        for q in every.values():
            q.observer, q.state = None, "off"
        prepared.meta[STAGE] = "prepared"
        raise
    fit_bias(prepared)
    if prepared.meta["graphq_target"].saturates:
        guard_saturation(prepared)
    if watchers:
        correct_bias(prepared, watchers, wanted)
    prepared.meta[STAGE] = "calibrated"
    return prepared


def _observe_constants(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        quantizer = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, TensorQuantizer) and quantizer.constant:
            tensor = parameter(gm, node.args[0])
            assert tensor is not None
            quantizer.update(tensor)


def _after_training(trained: fx.GraphModule) -> fx.GraphModule:
    """Weights and biases have moved since calibration, and must fit the kernels again."""
    gm = settle(trained)
    fit_bias(gm)
    if gm.meta["graphq_target"].saturates:
        guard_saturation(gm)
    return gm


@uncollected()
def convert(calibrated: fx.GraphModule) -> fx.GraphModule:
    """Replace quantizers by graphq::quantize and graphq::dequantize, weights and biases by integer codes.

    A new graph; the calibrated one stays as it is.
    """
    _expect(calibrated, "calibrated", "convert", "Call graphq.prepare and graphq.calibrate first.")
    if FOLDED in calibrated.meta:
        raise StateError(
            "the weights of this graph are folded: their codes and float values are gone",
            remedy="Convert the calibrated graph that was folded; fold_weights gave a copy.",
        )
    gm = _after_training(calibrated) if TRAINED in calibrated.meta else fork(calibrated)
    quantize_bias(gm)
    to_qdq(gm)
    check_stage(gm, after="to_qdq")
    gm.meta[STAGE] = "converted"
    return gm


def export(graph: fx.GraphModule, path: str | Path) -> Path:
    """Lower a converted graph to its target's form and write it: an ONNX QDQ model for "onnxruntime".

    A captured graph is written too, as the float model to compare with.
    """
    if stage_of(graph) == "captured":
        return export_onnx(name_nodes(fork(graph)), path, {"graphq.config": "float"})
    _expect(graph, "converted", "export", "Call graphq.convert on the calibrated graph first.")
    target: Target = graph.meta["graphq_target"]
    return export_onnx(target.lowering(graph), path, metadata_of(graph), target.translations)


def quantize(
    model: Model,
    config: QuantConfig | str | Path = "int8",
    data: Any = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    target: Target | str = "onnxruntime",
    dynamic_shapes: Any = "batch",
    progress: bool = True,
) -> fx.GraphModule:
    """prepare, calibrate and convert in one call. Without args and kwargs, the first batch of data is the example."""
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
    prepared = prepare(model, config, args, kwargs, target=target, dynamic_shapes=dynamic_shapes)
    return convert(calibrate(prepared, data, progress=progress))
