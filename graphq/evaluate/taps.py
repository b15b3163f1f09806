"""Look inside ONNX Runtime: the graph that its optimizer made of a model, and the values between its kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as pybind11_state

from graphq.errors import RuntimeMismatch

REFUSALS = tuple(getattr(pybind11_state, n) for n in ("Fail", "InvalidGraph", "InvalidArgument", "NotImplemented"))
PRODUCTS = ("MatMulNBits", "DynamicQuantizeMatMul")


def load_model(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX file. Raises RuntimeMismatch if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise RuntimeMismatch("there is no such file", where=str(path), remedy="Export the model first.")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(str(path))
    except Exception as e:  # protobuf, onnx and the file system each raise their own kinds
        raise RuntimeMismatch(
            f"this is not a valid ONNX model: {str(e).splitlines()[0][:160]}",
            where=str(path),
            remedy="Export it again with graphq.export.",
        ) from e
    return model


def session(
    path: str | Path | bytes,
    *,
    threads: int = 0,
    optimize: bool = True,
    save_to: Path | None = None,
    data_file: str = "",
) -> Any:
    """A CPU session with default options, except that no thread spins while it waits (sessions share the cores).
    save_to: where the optimized model goes, its large tensors to a data_file beside it, if one is named."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to is not None:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(save_to)
    if data_file:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data_file)
    source = path if isinstance(path, bytes) else str(path)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except REFUSALS as e:
        raise RuntimeMismatch(
            f"ONNX Runtime does not run this model: {str(e).splitlines()[0][:200]}",
            where="" if isinstance(path, bytes) else str(path),
            remedy="Ops of other runtimes and types without a kernel run where they belong only.",
        ) from e


def optimized_model(path: str | Path) -> onnx.ModelProto:
    """The model after ONNX Runtime's optimizer, before its layout passes: its nodes are the kernels that run."""
    inside = onnx.load(path, load_external_data=False).graph.initializer
    external = any(i.data_location == onnx.TensorProto.EXTERNAL for i in inside)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimized.onnx"
        session(path, save_to=saved, data_file="optimized.data" if external else "")
        return onnx.load(saved)


def token_products(model: onnx.ModelProto, made: Mapping[str, onnx.NodeProto]) -> dict[str, str]:
    """The same for products with a scale per token: x / scale ─ Q ─ MatMulInteger ─ Cast ─ Mul ─ Mul."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = {}
    for node in model.graph.node:
        quantize = made.get(node.input[0]) if node.op_type == "MatMulInteger" else None
        divide = made.get(quantize.input[0]) if quantize is not None else None
        if divide is None or divide.op_type != "Div":
            continue
        result = node.output[0]
        for expected in ("Cast", "Mul", "Mul"):
            after = readers.get(result, [])
            if len(after) == 1 and after[0].op_type == expected:
                result = after[0].output[0]
        found[result] = divide.input[0]
    return found


class Taps:
    """Runs the model, optimized or as it is, and gives inner tensors, without changing which kernels run."""

    def __init__(self, path: str | Path, wanted: Iterable[str], *, optimize: bool = True, threads: int = 0) -> None:
        model = optimized_model(path) if optimize else load_model(path)
        made = {name: node for node in model.graph.node for name in node.output}
        # result of a product with float inputs and integer weights → that input: it is judged on the very values it got
        self.products = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type in PRODUCTS}
        self.products |= token_products(model, made)
        around = dict.fromkeys(v for pair in self.products.items() for v in pair)
        self.names = [n for n in dict.fromkeys([*wanted, *around]) if n in made]
        self.kernels = {n: made[n].op_type for n in self.names}
        outputs = {o.name for o in model.graph.output}
        self.outputs = [o.name for o in model.graph.output]
        model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in self.names if n not in outputs)
        with tempfile.TemporaryDirectory() as folder:
            tapped = Path(folder) / "tapped.onnx"
            large = model.ByteSize() > 2**30
            onnx.save(model, tapped, save_as_external_data=large)
            self.model = onnx.load(tapped) if large else model  # external data is taken out of what is saved
            self._session = session(tapped, optimize=False, threads=threads)
        types = {o.name: o.type[7:-1] for o in self._session.get_outputs() if o.name in self.kernels}
        types = {name: t for name, t in types.items() if not t.startswith("float8")}  # NumPy does not know them
        self.names = [n for n in self.names if n in types]
        self.dtypes = {name: np.dtype(t) for name, t in types.items() if t != "float"}

    def run(self, feed: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
        """(inner tensors by name, outputs of the model)."""
        values = self._session.run([*self.names, *self.outputs], feed)
        return dict(zip(self.names, values, strict=False)), values[len(self.names) :]
