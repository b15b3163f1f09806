"""Write a converted graph as an ONNX QDQ model.

`torch.onnx` translates the ATen ops; graphq's own two get the translations below, which keep the dtype of the codes.
Values are named after the nodes of the converted graph, so that a file and its graph can be compared op by op.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import fx

from graphq.errors import ExportError
from graphq.export import contrib, standard, tensorrt
from graphq.graph.capture import Example, example_of
from graphq.graph.generated import generate
from graphq.graph.onnx_ops import DEQUANTIZE_LINEAR, GLOBAL_AVERAGE_POOL, QUANTIZE_LINEAR, SUM
from graphq.graph.view import module_stack

OPSET = 20
OPSET_16_BIT = 21  # the first in which Q and DQ know int16 and uint16
EXTERNAL_DATA_BYTES = 2**31 - 2**24  # a protobuf holds less than 2 GiB
NAME = "graphq"


def _quantize(x, scale, zero_point):  # type: ignore[no-untyped-def]
    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize(codes, scale, zero_point, axis: int):  # type: ignore[no-untyped-def]
    return op.DequantizeLinear(codes, scale, zero_point, axis=axis)


def _global_average_pool(x):  # type: ignore[no-untyped-def]
    return op.GlobalAveragePool(x)


def _sum_of_two(a, b):  # type: ignore[no-untyped-def]
    return op.Sum(a, b)


TRANSLATIONS: dict[Any, Any] = {
    SUM: _sum_of_two,
    QUANTIZE_LINEAR: _quantize,
    DEQUANTIZE_LINEAR: _dequantize,
    GLOBAL_AVERAGE_POOL: _global_average_pool,
}


def export_onnx(
    lowered: fx.GraphModule,
    path: str | Path,
    metadata: dict[str, str],
    translations: Mapping[Any, Callable[..., Any]] | None = None,
) -> Path:
    """Write a graph in ONNX's form (see `graphq.passes.lowering.onnx_qdq`) to `path`, all of it or nothing.

    metadata: goes into the model's metadata_props. translations: op → onnxscript function, for more ops.
    Weights go to `path`.data when the file would pass 2 GiB.
    Raises ExportError if the path cannot be written or the model does not pass onnx.checker.
    """
    path = writable(Path(path))
    model = to_onnx(
        lowered,
        example_of(lowered),
        {
            **TRANSLATIONS,
            **standard.TRANSLATIONS,
            **contrib.TRANSLATIONS,
            **tensorrt.TRANSLATIONS,
            **(translations or {}),
        },
    )
    if standard.DOMAIN in model.opset_imports:
        standard.write_standard(model, OPSET)
    tensorrt.type_results(model)
    contrib.type_results(model)
    model.metadata_props.update(metadata)
    size = sum(i.const_value.nbytes for i in model.graph.initializers.values() if i.const_value is not None)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            part = Path(folder) / path.name
            external = f"{path.name}.data" if size > EXTERNAL_DATA_BYTES else None
            ir.save(model, part, external_data=external)
            onnx.checker.check_model(str(part))
            for file in sorted(Path(folder).iterdir(), reverse=True):  # the model last: it names its data
                os.replace(file, path.parent / file.name)
    except OSError as e:
        raise ExportError(
            f"the model could not be written: {e.strerror or e}", where=str(path), remedy="Free space, or another path."
        ) from e
    except onnx.checker.ValidationError as e:
        raise ExportError(f"the exported model is not valid: {e}", where=str(path), remedy="Please report it.") from e
    return path


def writable(path: Path, suffix: str = ".onnx") -> Path:
    """The path, if a file of that kind can be written there. Raises ExportError."""
    if path.suffix != suffix:
        what = f"{path.name!r} does not end in {suffix}"
        raise ExportError(what, where=str(path), remedy=f"Name the file model{suffix}.")
    if not path.parent.is_dir():
        raise ExportError("the folder does not exist", where=str(path.parent), remedy="Make it first.")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ExportError("this path cannot be written", where=str(path), remedy="Choose another path.")
    if shutil.disk_usage(path.parent).free == 0:
        raise ExportError("the disk is full", where=str(path.parent), remedy="Free some space.")
    return path


def to_onnx(gm: fx.GraphModule, example: Example, translations: Mapping[Any, Callable[..., Any]]) -> ir.Model:
    """Translate a graph of ATen ops and graphq's ONNX ops; float graphs too."""
    with quiet(), torch.no_grad():
        generate(gm)
        program = torch.export.export(gm, example.args, example.kwargs, dynamic_shapes=example.dynamic_shapes)
        translated = torch.onnx.export(
            program,
            dynamo=True,
            optimize=True,
            verbose=False,
            opset_version=_opset(gm),
            custom_translation_table=dict(translations),
        )
    if translated is None:
        raise ExportError("torch.onnx produced no model", remedy="Please report it with the model.")
    traced = translated.exported_program or program  # torch.onnx traces again, and gives some nodes new names
    names = {n.name: n.meta["custom"][NAME] for n in traced.graph.nodes if NAME in n.meta.get("custom", {})}
    paths = {n.name: module_stack(n)[-1][0] for n in gm.graph.nodes if module_stack(n)}
    _rename(translated.model, names, paths)
    return translated.model


def _opset(gm: fx.GraphModule) -> int:
    wide = (torch.int16, torch.uint16)
    return OPSET_16_BIT if any(b.dtype in wide for b in gm.buffers()) else OPSET


def _rename(model: ir.Model, names: dict[str, str], paths: dict[str, str]) -> None:
    """Name values after the graph's nodes, and write the module path on every ONNX node."""
    given = set(names.values())  # an output that torch has named like another node of ours cannot keep that name
    outputs = [v.name for v in model.graph.outputs if v.name not in given or names.get(str(v.name)) in (None, v.name)]
    kept = {*(v.name for v in model.graph.inputs), *outputs}
    taken = {v.name for n in model.graph for v in n.outputs} | kept | set(model.graph.initializers)
    renamed: list[tuple[ir.Value, str]] = []
    for node in model.graph:
        original = next((names[v.name] for v in node.outputs if v.name in names), None)
        if original is None:
            continue
        node.metadata_props["graphq.node"] = original
        if original in paths:
            node.metadata_props["graphq.module"] = paths[original]
        value = next(v for v in node.outputs if v.name in names)
        if value.name not in kept and original != value.name:
            taken.discard(value.name)
            renamed.append((value, original))
    for value, _ in renamed:
        value.name = f"{value.name}__old"
    for value, original in renamed:
        unique, number = original, 0
        while unique in taken:
            number += 1
            unique = f"{original}_{number}"
        value.name = unique
        taken.add(unique)
    for node in model.graph:
        for key in [k for k in node.metadata_props if k.startswith(("pkg.torch", "pkg.onnxscript", "namespace"))]:
            del node.metadata_props[key]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings of torch's exporters, which are about themselves, off the user's screen."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "torch.export")
    before = {n: logging.getLogger(n).level for n in names}
    for n in names:
        logging.getLogger(n).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for n, level in before.items():
            logging.getLogger(n).setLevel(level)


def name_nodes(gm: fx.GraphModule) -> fx.GraphModule:
    """Mark every node with its name, which torch.export carries through to the file."""
    for node in gm.graph.nodes:
        node.meta["custom"] = {NAME: node.name}
    return gm


def metadata_of(gm: fx.GraphModule) -> dict[str, Any]:
    """What is written into the file about how it was made."""
    target = gm.meta["graphq_target"]
    return {
        "graphq.config": gm.meta["graphq_config"].name,
        "graphq.target": target.name,
        "graphq.cpu": target.cpu,
    }
