"""An ONNX model as the lint reads it: who makes a value, who reads it, what is constant, what was dequantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


@dataclass
class Dequantized:
    """What a DequantizeLinear says. codes: their name; scale, zero: their values, None where they are computed (zero is
    None too where it is left out); axis: along which a vector of scales runs; block: values per scale along it."""

    node: onnx.NodeProto
    codes: str
    scale: np.ndarray | None
    zero: np.ndarray | None
    axis: int
    block: int

    @property
    def per_axis(self) -> bool:
        return self.scale is not None and self.scale.size > 1 and not self.block


class Graph:
    """The main graph of a model, indexed."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.nodes = model, list(model.graph.node)
        self.initializers = {i.name: i for i in model.graph.initializer}
        self.made = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.outputs = {o.name for o in model.graph.output}
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, name: str) -> np.ndarray | None:
        """The value of an initializer or Constant."""
        if name not in self._arrays:
            node = self.made.get(name)
            if name in self.initializers:
                self._arrays[name] = numpy_helper.to_array(self.initializers[name])
            elif node is not None and node.op_type == "Constant":
                value = onnx.helper.get_attribute_value(node.attribute[0])
                is_tensor = isinstance(value, onnx.TensorProto)
                dtype = np.float32 if node.attribute[0].name.startswith("value_float") else None
                self._arrays[name] = numpy_helper.to_array(value) if is_tensor else np.asarray(value, dtype)
            else:
                return None
        return self._arrays[name]

    def dequantized(self, name: str) -> Dequantized | None:
        """The DequantizeLinear that makes a value."""
        node = self.made.get(name)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        return self.quantization(node)

    def quantization(self, node: onnx.NodeProto) -> Dequantized:
        """What a QuantizeLinear or DequantizeLinear says of its values."""
        zero = self.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        axis, block = int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0))
        return Dequantized(node, node.input[0], self.array(node.input[1]), zero, axis, block)

    def code_type(self, node: onnx.NodeProto) -> np.dtype | None:
        """The type of the codes of a node without zero point; None where it is not seen."""
        if node.op_type == "QuantizeLinear":
            return np.dtype(np.uint8)
        codes, maker = self.array(node.input[0]), self.made.get(node.input[0])
        if codes is not None:
            return codes.dtype
        if maker is None or maker.op_type != "QuantizeLinear":
            return None
        zero = self.quantization(maker).zero
        return np.dtype(np.uint8) if zero is None else zero.dtype

    def has_zero(self, node: onnx.NodeProto) -> bool:
        return len(node.input) > 2 and bool(node.input[2])

    def sole_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a value; None where there are others, or it is an output of the model."""
        readers = self.readers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def label(self, node: onnx.NodeProto) -> str:
        return f"{node.op_type} {node.name or node.output[0]}"


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """An attribute's value, or the default."""
    found = next((a for a in node.attribute if a.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)
