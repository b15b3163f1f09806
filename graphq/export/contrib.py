"""ONNX Runtime's own operators (domain com.microsoft): MatMulNBits and GatherBlockQuantized for packed weights,
DynamicQuantizeMatMul for inputs that are quantized at run time, and with ONNX's QLinearConv the integer kernels of
models in QOperator form."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.defs import OpSchema, has, register_schema
from onnxscript import opset18 as op
from onnxscript.values import Opset

from graphq.graph.dynamic_ops import DYNAMIC_QGEMM, SMALLEST, TOKEN_QGEMM
from graphq.graph.elementwise_ops import QAVG_POOL, QCAT, QLEAKY_RELU, QMUL, QSIGMOID, QSOFTMAX, QWHERE
from graphq.graph.integer_ops import QADD, QAVERAGE_POOL, QCONV, QGEMM, QMATMUL
from graphq.graph.nbits_ops import GATHER_NBITS, MATMUL_NBITS
from graphq.graph.recurrent_ops import DYNAMIC_LSTM

DOMAIN = "com.microsoft"
ATTRIBUTES = {
    "MatMulNBits": ("K", "N", "bits", "block_size", "accuracy_level"),
    "GatherBlockQuantized": ("bits", "block_size", "gather_axis", "quantize_axis"),
    "DynamicQuantizeMatMul": (),
    "DynamicQuantizeLSTM": ("direction", "hidden_size"),
    "QGemm": ("transB",),
    "MatMulIntegerToFloat": (),
    "QLinearAdd": (),
    "QLinearMul": (),
    "QLinearGlobalAveragePool": ("channels_last",),
    "QLinearAveragePool": ("kernel_shape", "strides", "pads", "count_include_pad"),
    "QLinearSigmoid": (),
    "QLinearLeakyRelu": ("alpha",),
    "QLinearSoftmax": ("axis", "opset"),
    "QLinearConcat": ("axis",),
    "QLinearWhere": (),
}
TYPES = {  # of attributes that are no numbers
    **dict.fromkeys(("kernel_shape", "strides", "pads"), OpSchema.AttrType.INTS),
    "alpha": OpSchema.AttrType.FLOAT,
    "direction": OpSchema.AttrType.STRING,
}
TWO_TENSORS = ("A", "A_scale", "A_zero_point", "B", "B_scale", "B_zero_point", "C_scale", "C_zero_point")
ONE_TENSOR = ("X", "x_scale", "x_zero_point", "y_scale", "y_zero_point")
INPUTS = {
    "MatMulNBits": ("A", "B", "scales", "zero_points", "g_idx", "bias"),
    "GatherBlockQuantized": ("data", "indices", "scales", "zero_points"),
    "DynamicQuantizeMatMul": ("A", "B", "b_scale", "b_zero_point", "bias"),
    "DynamicQuantizeLSTM": (
        "X",
        "W",
        "R",
        "B",
        "sequence_lens",
        "initial_h",
        "initial_c",
        "P",
        "W_scale",
        "W_zero_point",
        "R_scale",
        "R_zero_point",
    ),
    "QGemm": ("A", "a_scale", "a_zero_point", "B", "b_scale", "b_zero_point", "C", "y_scale", "y_zero_point"),
    "MatMulIntegerToFloat": ("A", "B", "a_scale", "b_scale", "a_zero_point", "b_zero_point", "bias"),
    "QLinearAdd": TWO_TENSORS,
    "QLinearMul": TWO_TENSORS,
    "QLinearGlobalAveragePool": ONE_TENSOR,
    "QLinearAveragePool": ONE_TENSOR,
    "QLinearSigmoid": ONE_TENSOR,
    "QLinearLeakyRelu": ONE_TENSOR,
    "QLinearSoftmax": ONE_TENSOR,
    "QLinearWhere": (
        "condition",
        "X",
        "x_scale",
        "x_zero_point",
        "Y",
        "y_scale",
        "y_zero_point",
        "z_scale",
        "z_zero_point",
    ),
    "QLinearConcat": ("inputs",),  # the result's scale and zero point, then each tensor with its own
}
CODES = ("QGemm", *(name for name in INPUTS if name.startswith("QLinear")))  # may be results of these
RESULTS = {"DynamicQuantizeLSTM": ("Y", "Y_h", "Y_c")}
REQUIRED = 3  # of these inputs
SOFTMAX_OPSET = 13  # whose Softmax is meant: over one axis


def _schema(name: str) -> OpSchema:
    """What onnxscript wants to know of an op before it writes one."""
    optional = OpSchema.FormalParameterOption.Optional
    single = OpSchema.FormalParameterOption.Single
    many = OpSchema.FormalParameterOption.Variadic
    types = ["tensor(bool)", "tensor(float)", "tensor(uint8)", "tensor(int8)", "tensor(int64)", "tensor(int32)"]
    results = types if name in CODES else ["tensor(float)"]
    inputs = [
        OpSchema.FormalParameter(
            n,
            f"T{i}",
            param_option=many if n == "inputs" else single if i < REQUIRED else optional,
            is_homogeneous=False,
        )
        for i, n in enumerate(INPUTS[name])
    ]
    return OpSchema(
        name, DOMAIN, 1,
        inputs=inputs,
        outputs=[OpSchema.FormalParameter(n, "TY") for n in RESULTS.get(name, ("Y",))],
        type_constraints=[*((f"T{i}", types, "") for i in range(len(inputs))), ("TY", results, "")],
        attributes=[
            OpSchema.Attribute(a, TYPES.get(a, OpSchema.AttrType.INT), "", required=True) for a in ATTRIBUTES[name]
        ],
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


def _dynamic_qgemm(x, w, w_scale, w_zero, bias, saturating=False):  # type: ignore[no-untyped-def]
    inputs = (x, w, w_scale, w_zero) if bias is None else (x, w, w_scale, w_zero, bias)
    return _contrib.DynamicQuantizeMatMul(*inputs)


def _token_qgemm(x, w, w_scale, w_zero, steps, saturating=False):  # type: ignore[no-untyped-def]
    last: Any = op.Constant(value_ints=[-1])
    largest = op.Max(op.ReduceMax(op.Abs(x), last, keepdims=1), op.Constant(value_float=SMALLEST))
    scale = op.Div(largest, op.Constant(value_float=steps))
    middle: Any = op.Constant(value=onnx.numpy_helper.from_array(np.array(128, np.uint8)))
    one: Any = op.Constant(value_float=1.0)
    codes = op.QuantizeLinear(op.Div(x, scale), one, middle)
    total = op.Cast(op.MatMulInteger(codes, w, middle, w_zero), to=int(ir.DataType.FLOAT))
    return op.Mul(op.Mul(total, scale), w_scale)


def _dynamic_lstm(  # type: ignore[no-untyped-def]
    x, w, w_scale, w_zero, r, r_scale, r_zero, bias, h, c, reverse=False
):
    first: Any = op.Constant(value_ints=[0])  # the axis of directions
    scales = [op.Unsqueeze(s, first) for s in (w_scale, w_zero, r_scale, r_zero)]
    both = None if bias is None else op.Concat(bias, op.Sub(bias, bias), axis=0)
    weights = [None if v is None else op.Unsqueeze(v, first) for v in (w, r, both)]
    states = [op.Unsqueeze(s, first) for s in (h, c)]
    how = {"direction": "reverse" if reverse else "forward", "hidden_size": r.shape[0]}
    y, last_h, last_c = _contrib.DynamicQuantizeLSTM(x, *weights, None, *states, None, *scales, **how)
    second: Any = op.Constant(value_ints=[1])
    return op.Squeeze(y, second), op.Squeeze(last_h, first), op.Squeeze(last_c, first)


def _qconv(  # type: ignore[no-untyped-def]
    x, xs, xz, w, ws, wz, bias, ys, yz, format, stride, padding, dilation, groups, outer_padding, saturating=False
):
    before = [p + o for p, o in zip(padding, _ends(outer_padding, 0, len(padding)), strict=True)]
    after = [p + o for p, o in zip(padding, _ends(outer_padding, 1, len(padding)), strict=True)]
    inputs = [x, xs, xz, w, ws, wz, ys, yz] + ([] if bias is None else [bias])
    shape = {"strides": list(stride), "pads": [*before, *after], "dilations": list(dilation)}
    return op.QLinearConv(*inputs, group=groups, **shape)  # type: ignore[arg-type]


def _ends(outer: list[int], end: int, rank: int) -> list[int]:
    """torch's padding (last axis first, both ends of it) at one end, first axis first."""
    given = list(reversed(outer[end::2]))
    return [0] * (rank - len(given)) + given


def _qgemm(x, xs, xz, w, ws, wz, bias, ys, yz, format, saturating=False):  # type: ignore[no-untyped-def]
    if ys is None and bias is None:
        return _contrib.MatMulIntegerToFloat(x, op.Transpose(w, perm=[1, 0]), xs, ws, xz, wz)
    result = [] if ys is None else [ys, yz]
    if len(x.shape) == 2:
        return _contrib.QGemm(x, xs, xz, w, ws, wz, bias, *result, transB=1)
    rows = op.Reshape(x, op.Constant(value_ints=[-1, w.shape[1]]))  # type: ignore[arg-type]
    product = _contrib.QGemm(rows, xs, xz, w, ws, wz, bias, *result, transB=1)
    sizes = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[w.shape[0]]), axis=0)  # type: ignore[type-var]
    return op.Reshape(product, sizes)  # type: ignore[arg-type]


def _qmatmul(x, xs, xz, y, ys, yz, zs=None, zz=None, format="uint8"):  # type: ignore[no-untyped-def]
    if zs is not None:
        return op.QLinearMatMul(x, xs, xz, y, ys, yz, zs, zz)
    return _contrib.MatMulIntegerToFloat(x, y, xs, ys, xz, yz)


def _qadd(a, a_scale, a_zero, b, b_scale, b_zero, ys, yz, format):  # type: ignore[no-untyped-def]
    return _contrib.QLinearAdd(a, a_scale, a_zero, b, b_scale, b_zero, ys, yz)


def _qaverage_pool(x, xs, xz, ys, yz, format):  # type: ignore[no-untyped-def]
    return _contrib.QLinearGlobalAveragePool(x, xs, xz, ys, yz, channels_last=0)


def _qmul(a, a_scale, a_zero, b, b_scale, b_zero, ys, yz, format):  # type: ignore[no-untyped-def]
    return _contrib.QLinearMul(a, a_scale, a_zero, b, b_scale, b_zero, ys, yz)


def _qsigmoid(x, xs, xz, ys, yz, format):  # type: ignore[no-untyped-def]
    return _contrib.QLinearSigmoid(x, xs, xz, ys, yz)


def _qleaky_relu(x, xs, xz, ys, yz, format, slope):  # type: ignore[no-untyped-def]
    return _contrib.QLinearLeakyRelu(x, xs, xz, ys, yz, alpha=slope)


def _qsoftmax(x, xs, xz, ys, yz, format):  # type: ignore[no-untyped-def]
    return _contrib.QLinearSoftmax(x, xs, xz, ys, yz, axis=-1, opset=SOFTMAX_OPSET)


def _qcat(tensors, scales, zeros, ys, yz, format, dim):  # type: ignore[no-untyped-def]
    parts = [operand for part in zip(tensors, scales, zeros, strict=True) for operand in part]
    return _contrib.QLinearConcat(ys, yz, *parts, axis=dim)


def _qwhere(condition, a, a_scale, a_zero, b, b_scale, b_zero, ys, yz, format):  # type: ignore[no-untyped-def]
    return _contrib.QLinearWhere(condition, a, a_scale, a_zero, b, b_scale, b_zero, ys, yz)


def _qavg_pool(x, xs, xz, ys, yz, format, kernel, stride, padding, count_include_pad):  # type: ignore[no-untyped-def]
    shape = {"kernel_shape": list(kernel), "strides": list(stride), "pads": [*padding, *padding]}
    return _contrib.QLinearAveragePool(x, xs, xz, ys, yz, **shape, count_include_pad=int(count_include_pad))


def type_results(model: ir.Model) -> None:
    """Write down, in place, the types that ONNX cannot infer: codes have that of the result's zero point."""
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        if node.domain == DOMAIN:
            whole = node.op_type in CODES and len(node.inputs) >= len(INPUTS[node.op_type])
            source = node.inputs[-1] if whole else None  # a zero point
        dtype = source.dtype if source is not None else ir.DataType.FLOAT
        for result in node.outputs:
            if result.type is None:
                result.type = ir.TensorType(dtype or ir.DataType.FLOAT)


TRANSLATIONS: dict[Any, Any] = {
    MATMUL_NBITS: _matmul_nbits,
    GATHER_NBITS: _gather_nbits,
    DYNAMIC_QGEMM: _dynamic_qgemm,
    TOKEN_QGEMM: _token_qgemm,
    DYNAMIC_LSTM: _dynamic_lstm,
    QCONV: _qconv,
    QGEMM: _qgemm,
    QMATMUL: _qmatmul,
    QADD: _qadd,
    QAVERAGE_POOL: _qaverage_pool,
    QAVG_POOL: _qavg_pool,
    QMUL: _qmul,
    QSIGMOID: _qsigmoid,
    QLEAKY_RELU: _qleaky_relu,
    QSOFTMAX: _qsoftmax,
    QCAT: _qcat,
    QWHERE: _qwhere,
}
