"""TensorRT's own operators (domain trt): blocks whose scales it finds at run time, and MXFP8 weights.

TRT_FP4DynamicQuantize      x, scale of the tensor → fp4 codes, fp8 block scales; two DequantizeLinear follow
TRT_MXFP8DynamicQuantize    x → fp8 codes, E8M0 block scales as uint8; TRT_MXFP8DequantizeLinear follows
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx.defs import OpSchema, has, register_schema
from onnxscript.values import Opset

from graphq.export.standard import dequantize_without_zero_point
from graphq.graph.block_ops import DYNAMIC_BLOCKS, MXFP8_WEIGHT

DOMAIN = "trt"
FLOAT, FP4, FP8, UINT8 = (ir.DataType[n] for n in ("FLOAT", "FLOAT4E2M1", "FLOAT8E4M3FN", "UINT8"))
OPS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[ir.DataType, ...]]] = {  # inputs, attributes, results
    "TRT_FP4DynamicQuantize": (("x", "scale"), ("axis", "block_size", "scale_type"), (FP4, FP8)),
    "TRT_MXFP8DynamicQuantize": (("x",), ("axis", "block_size", "output_dtype"), (FP8, UINT8)),
    "TRT_MXFP8DequantizeLinear": (("x", "scale"), ("axis", "block_size", "output_dtype"), (FLOAT,)),
}


def _schema(name: str) -> OpSchema:
    inputs, attributes, results = OPS[name]
    types = ["tensor(float)", "tensor(float8e4m3fn)", "tensor(uint8)"]
    return OpSchema(
        name, DOMAIN, 1,
        inputs=[OpSchema.FormalParameter(n, f"T{i}") for i, n in enumerate(inputs)],
        outputs=[OpSchema.FormalParameter(f"y{i}", f"Y{i}") for i in range(len(results))],
        type_constraints=[*((f"T{i}", types, "") for i in range(len(inputs))),
                          *((f"Y{i}", types, "") for i in range(len(results)))],
        attributes=[OpSchema.Attribute(a, OpSchema.AttrType.INT, "", required=True) for a in attributes],
    )  # fmt: skip


for _name in OPS:
    if not has(_name, DOMAIN):
        register_schema(_schema(_name))
_trt: Any = Opset(DOMAIN, 1)


def _dynamic_blocks(x, overall, tensor_scale, block, format, kind):  # type: ignore[no-untyped-def]
    where = {"axis": len(block) - 1, "block_size": block[-1]}
    if tensor_scale is not None:
        codes, scales = _trt.TRT_FP4DynamicQuantize(x, tensor_scale, **where, scale_type=int(FP8))
        block_scales = dequantize_without_zero_point(scales, tensor_scale, [], "fp8_e4m3")
        return dequantize_without_zero_point(codes, block_scales, block, format)
    codes, exponents = _trt.TRT_MXFP8DynamicQuantize(x, **where, output_dtype=int(FP8))
    return _trt.TRT_MXFP8DequantizeLinear(codes, exponents, **where, output_dtype=int(FLOAT))


def _mxfp8_weight(codes, exponents, block):  # type: ignore[no-untyped-def]
    axis = max(range(len(block)), key=lambda d: block[d])
    where = {"axis": axis, "block_size": block[axis]}
    return _trt.TRT_MXFP8DequantizeLinear(codes, exponents, **where, output_dtype=int(FLOAT))


def type_results(model: ir.Model) -> None:
    """Write down, in place, the types of results, which are known of TensorRT's ops only here."""
    for node in model.graph:
        if node.domain == DOMAIN:
            for value, dtype in zip(node.outputs, OPS[node.op_type][2], strict=True):
                value.type = ir.TensorType(dtype)


TRANSLATIONS: dict[Any, Any] = {DYNAMIC_BLOCKS: _dynamic_blocks, MXFP8_WEIGHT: _mxfp8_weight}
