"""Quantize and dequantize in the formats of the ONNX standard: low-bit integers, small floats, blocks, E8M0 scales.

torch.onnx writes our two ops as nodes of the domain "graphq", and here they become QuantizeLinear and DequantizeLinear
with tensors of the true types, which torch does not have. The opset is the first that knows all types of the model.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx.defs import OpSchema, has, register_schema
from onnxscript.values import Opset

from graphq.errors import ExportError
from graphq.graph.ops import DEQUANTIZE, QUANTIZE, parse_format

DOMAIN = "graphq"


def _schema(name: str) -> OpSchema:
    """What onnxscript wants to know of an op before it writes one; no file has it in the end."""
    types = [f"tensor({t})" for t in ("float", "int8", "uint8", "int16", "uint16", "int32", "float16", "bfloat16",
                                      "float8e4m3fn", "float8e5m2")]  # fmt: skip
    inputs = [OpSchema.FormalParameter("x", "T"), OpSchema.FormalParameter("scale", "S")]
    inputs.append(OpSchema.FormalParameter("zero_point", "Z", param_option=OpSchema.FormalParameterOption.Optional))
    return OpSchema(
        name, DOMAIN, 1,
        inputs=inputs, outputs=[OpSchema.FormalParameter("y", "Y")],
        type_constraints=[(letter, types, "") for letter in "TSZY"],
        attributes=[OpSchema.Attribute("block", OpSchema.AttrType.INTS, "", required=True),
                    OpSchema.Attribute("format", OpSchema.AttrType.STRING, "", required=True)],
    )  # fmt: skip


for _name in ("Quantize", "Dequantize"):
    if not has(_name, DOMAIN):
        register_schema(_schema(_name))
_ops = Opset(DOMAIN, 1)
TYPES: dict[str, tuple[Any, int]] = {  # of codes → dtype of ml_dtypes, first opset
    "int2": (ml_dtypes.int2, 25), "uint2": (ml_dtypes.uint2, 25), "int4": (ml_dtypes.int4, 21),
    "uint4": (ml_dtypes.uint4, 21), "int8": (np.int8, 21), "uint8": (np.uint8, 21), "int16": (np.int16, 21),
    "uint16": (np.uint16, 21), "fp8_e4m3": (ml_dtypes.float8_e4m3fn, 19), "fp8_e5m2": (ml_dtypes.float8_e5m2, 19),
    "fp4_e2m1": (ml_dtypes.float4_e2m1fn, 23), "fp6_e3m2": (ml_dtypes.float6_e3m2fn, 28),
    "fp6_e2m3": (ml_dtypes.float6_e2m3fn, 28),
}  # fmt: skip
WIDER = {"int3": "int4", "uint3": "uint4", **{f"{u}int{b}": f"{u}int8" for u in ("", "u") for b in (5, 6, 7)}}
E8M0_OPSET, BLOCKED_OPSET = 24, 21
IR_VERSION = {19: 9, 20: 9, 21: 10, 22: 10, 23: 11, 24: 12, 25: 13}  # beyond: the newest that onnx knows


def _quantize(x, scale, zero_point, block, format):  # type: ignore[no-untyped-def]
    return _ops.Quantize(x, scale, zero_point, block=block or [0], format=format)


def _dequantize(codes, scale, zero_point, block, format):  # type: ignore[no-untyped-def]
    return _ops.Dequantize(codes, scale, zero_point, block=block or [0], format=format)


def dequantize_without_zero_point(codes, scale, block, format):  # type: ignore[no-untyped-def]
    """A DequantizeLinear of codes and scales that are both computed at run time."""
    return _ops.Dequantize(codes, scale, block=block or [0], format=format)


TRANSLATIONS = {QUANTIZE: _quantize, DEQUANTIZE: _dequantize}


def write_standard(model: ir.Model, opset: int) -> None:
    """Make nodes of our domain QuantizeLinear and DequantizeLinear, in place, and raise the opset as needed.

    Raises ExportError for a block shape or rounding that ONNX cannot say.
    """
    writer = _Writer(model, opset)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            writer.rewrite(node)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports[""] = writer.opset
    newest = max(IR_VERSION.values())
    model.ir_version = max(model.ir_version or 0, IR_VERSION.get(writer.opset, newest + 1))


class _Writer:
    def __init__(self, model: ir.Model, opset: int) -> None:
        self.model, self.opset = model, opset
        self.made: dict[tuple[str, str], ir.Value] = {}

    def rewrite(self, node: ir.Node) -> None:
        text = node.attributes["format"].as_string()
        fmt, _ = parse_format(text)
        flags = set(text.split(":")[1:])
        where = str(node.outputs[0].name)
        if node.op_type == "Quantize" and flags - {"e8m0", "unsaturated"}:
            raise ExportError(f"ONNX rounds half to even, not {text!r}", where=where, remedy="rounding: half_even.")
        name = WIDER.get(fmt.name, fmt.name) if node.op_type == "Dequantize" else fmt.name
        if name not in TYPES:
            raise ExportError(f"ONNX has no type for {fmt.name}", where=where, remedy=f"One of: {', '.join(TYPES)}.")
        dtype, since = TYPES[name]
        axis, size = _axis(list(node.attributes["block"].as_ints()), where)
        self.opset = max(self.opset, since, BLOCKED_OPSET if size else 0, E8M0_OPSET if "e8m0" in flags else 0)
        source, scale, zero = (*node.inputs, None)[:3]
        assert source is not None and scale is not None
        flat = not size
        computed = scale.producer() is not None and scale.producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
        kind = ml_dtypes.float8_e8m0fnu if "e8m0" in flags else np.float32
        new_scale = scale if computed else self._typed(scale, kind, flat)
        if node.op_type == "Dequantize" and source.const_value is not None:
            source = self._typed(source, dtype, False)
        operands = [source, new_scale] + ([] if zero is None else [self._typed(zero, dtype, flat)])
        for index, value in enumerate(operands):
            node.replace_input_with(index, value)
        node.attributes.clear()
        node.domain, node.op_type = "", f"{node.op_type}Linear"
        node.attributes["axis"] = ir.AttrInt64("axis", axis or 0)
        if size:
            node.attributes["block_size"] = ir.AttrInt64("block_size", size)
        if "e8m0" in flags and node.op_type == "DequantizeLinear":
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(ir.DataType.FLOAT))
        if node.op_type == "DequantizeLinear":
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        else:
            node.outputs[0].type = ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype)))
            if "unsaturated" in flags:
                node.attributes["saturate"] = ir.AttrInt64("saturate", 0)

    def _typed(self, value: ir.Value, dtype: Any, flat: bool) -> ir.Value:
        """An initializer in another type: integers by value, bit patterns as what they are the patterns of."""
        key = (str(value.name), f"{np.dtype(dtype).name}{flat}")
        if key not in self.made:
            tensor = value.const_value
            if tensor is None:
                raise ExportError(
                    "a scale that is computed at every call has no form in ONNX here",
                    where=str(value.name),
                    remedy="dynamic: false, or target 'simulation'.",
                )
            array = tensor.numpy()
            array = array.reshape(-1 if array.size > 1 else ()) if flat else array
            small = np.dtype(dtype).kind == "V" and np.dtype(dtype).itemsize == 1 and array.dtype == np.uint8
            patterns = small and not np.dtype(dtype).name.startswith(("int", "uint"))
            typed = np.ascontiguousarray(array.view(dtype) if patterns else array.astype(dtype)).reshape(array.shape)
            name = f"{value.name}_{np.dtype(dtype).name}"
            kind = ir.TensorType(ir.DataType.from_numpy(typed.dtype))
            new = ir.Value(name=name, shape=ir.Shape(typed.shape), type=kind)
            new.const_value = ir.Tensor(typed, name=name)
            self.model.graph.initializers[name] = new
            self.made[key] = new
        return self.made[key]


def _axis(block: list[int], where: str) -> tuple[int | None, int]:
    """(axis, block size) of a block shape: (None, 0) per tensor, (a, 0) per axis, (a, g) in blocks along an axis."""
    if block == [0]:
        return None, 0
    single = [d for d, b in enumerate(block) if b != -1]
    if len(single) == 1 and block[single[0]] == 1:
        return single[0], 0
    grouped = [d for d, b in enumerate(block) if b != 1]
    if len(grouped) == 1 and block[grouped[0]] > 1:
        return grouped[0], block[grouped[0]]
    raise ExportError(
        f"ONNX has no scales per block {block}", where=where, remedy="Use granularity tensor, channel, or group."
    )
