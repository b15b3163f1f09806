"""ONNX Runtime's own operators (domain com.microsoft): MatMulNBits and GatherBlockQuantized for packed weights,
DynamicQuantizeMatMul for inputs that are quantized at run time."""

from __future__ import annotations

from typing import Any

from onnx.defs import OpSchema, has, register_schema
from onnxscript import opset18 as op
from onnxscript.values import Opset

from graphq.graph.dynamic_ops import DYNAMIC_QGEMM
from graphq.graph.nbits_ops import GATHER_NBITS, MATMUL_NBITS

DOMAIN = "com.microsoft"
ATTRIBUTES = {
    "MatMulNBits": ("K", "N", "bits", "block_size", "accuracy_level"),
    "GatherBlockQuantized": ("bits", "block_size", "gather_axis", "quantize_axis"),
    "DynamicQuantizeMatMul": (),
}
INPUTS = {
    "MatMulNBits": ("A", "B", "scales", "zero_points", "g_idx", "bias"),
    "GatherBlockQuantized": ("data", "indices", "scales", "zero_points"),
    "DynamicQuantizeMatMul": ("A", "B", "b_scale", "b_zero_point", "bias"),
}
REQUIRED = 3  # of these inputs


def _schema(name: str) -> OpSchema:
    """What onnxscript wants to know of an op before it writes one."""
    optional = OpSchema.FormalParameterOption.Optional
    single = OpSchema.FormalParameterOption.Single
    types = ["tensor(float)", "tensor(uint8)", "tensor(int8)", "tensor(int64)", "tensor(int32)"]
    inputs = [
        OpSchema.FormalParameter(n, f"T{i}", param_option=single if i < REQUIRED else optional)
        for i, n in enumerate(INPUTS[name])
    ]
    return OpSchema(
        name, DOMAIN, 1,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter("Y", "TY")],
        type_constraints=[*((f"T{i}", types, "") for i in range(len(inputs))), ("TY", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(a, OpSchema.AttrType.INT, "", required=True) for a in ATTRIBUTES[name]],
    )  # fmt: skip


for _name in ATTRIBUTES:
    if not has(_name, DOMAIN):
        register_schema(_schema(_name))
_contrib = Opset(DOMAIN, 1)


def _matmul_nbits(x, packed, scale, zero_point, bias, k, bits, block_size, accuracy_level):  # type: ignore[no-untyped-def]
    inputs = [x, packed, scale, zero_point, None, bias]  # between them the order of columns
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, Any] = {"K": k, "N": packed.shape[0], "bits": bits, "block_size": block_size}
    return _contrib.MatMulNBits(*inputs, **attributes, accuracy_level=accuracy_level)


def _gather_nbits(packed, ids, scale, zero_point, k, bits, block_size):  # type: ignore[no-untyped-def]
    rows = op.Reshape(packed, op.Constant(value_ints=[packed.shape[0], k * bits // 8]))  # type: ignore[arg-type]
    inputs = (rows, ids, scale) if zero_point is None else (rows, ids, scale, zero_point)
    attributes: dict[str, Any] = {"bits": bits, "block_size": block_size, "gather_axis": 0, "quantize_axis": 1}
    return _contrib.GatherBlockQuantized(*inputs, **attributes)


def _dynamic_qgemm(x, w, w_scale, w_zero, bias):  # type: ignore[no-untyped-def]
    inputs = (x, w, w_scale, w_zero) if bias is None else (x, w, w_scale, w_zero, bias)
    return _contrib.DynamicQuantizeMatMul(*inputs)


TRANSLATIONS: dict[Any, Any] = {
    MATMUL_NBITS: _matmul_nbits,
    GATHER_NBITS: _gather_nbits,
    DYNAMIC_QGEMM: _dynamic_qgemm,
}
