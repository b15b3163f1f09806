"""Integer kernels that work element by element, bit for bit: graphq::qmul, qsigmoid, qleaky_relu, qcat, qwhere,
qsoftmax, qavg_pool.

One that reads a single tensor is a table of 256 codes in ONNX Runtime: a code is dequantized, transformed and quantized
in float32. Scales are float32 [], zero points int32 []. Softmax sums and pooling windows are added in float32, in
order, as the kernels (MLAS and contrib ops) do it; softmax divides in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graphq.graph.integer_ops import codes_like
from graphq.graph.ops import parse_format

BELOW_OVERFLOW = 5  # the softmax table's largest entry: float32's largest, divided by the sum's length and e^5


def to_codes(value: Tensor, scale: Tensor, zero: Tensor, format: str) -> Tensor:
    """float32 → codes: divided by the scale, rounded half to even, moved by the zero point, saturated."""
    fmt, _ = parse_format(format)
    low, high = (limit - zero for limit in fmt.limits())
    return (torch.round((value / scale).clamp(low.float(), high.float())) + zero).to(fmt.storage)


def _values(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return scale * (x.to(torch.int32) - zero).float()


@torch.library.custom_op("graphq::qmul", mutates_args=())
def qmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    format: str,
) -> Tensor:
    """QLinearMul: codes of a and b → codes; the zero point is added before rounding."""
    fmt, _ = parse_format(format)
    product = (a.to(torch.int32) - a_zero) * (b.to(torch.int32) - b_zero)
    scaled = product.float() * (a_scale * b_scale / y_scale) + y_zero.float()
    return torch.round(scaled).clamp(*fmt.limits()).to(fmt.storage)


@torch.library.custom_op("graphq::qsigmoid", mutates_args=())
def qsigmoid(x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor, format: str) -> Tensor:
    """QLinearSigmoid: codes → codes."""
    return to_codes(torch.sigmoid(_values(x, x_scale, x_zero)), y_scale, y_zero, format)


@torch.library.custom_op("graphq::qleaky_relu", mutates_args=())
def qleaky_relu(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor, format: str, slope: float
) -> Tensor:
    """QLinearLeakyRelu: codes → codes."""
    value = _values(x, x_scale, x_zero)
    return to_codes(torch.where(value >= 0, value, value * value.new_tensor(slope)), y_scale, y_zero, format)


@torch.library.custom_op("graphq::qcat", mutates_args=())
def qcat(
    tensors: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor],
    y_scale: Tensor,
    y_zero: Tensor,
    format: str,
    dim: int,
) -> Tensor:
    """QLinearConcat: codes of each → codes with the result's scale."""
    parts = zip(tensors, scales, zeros, strict=True)
    return torch.cat([to_codes(_values(*part), y_scale, y_zero, format) for part in parts], dim)


@torch.library.custom_op("graphq::qwhere", mutates_args=())
def qwhere(
    condition: Tensor,
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    format: str,
) -> Tensor:
    """QLinearWhere: codes of a where the condition holds, else of b → codes with the result's scale."""
    chosen, other = (
        to_codes(_values(*part), y_scale, y_zero, format) for part in ((a, a_scale, a_zero), (b, b_scale, b_zero))
    )
    return torch.where(condition, chosen, other)


@torch.library.custom_op("graphq::qsoftmax", mutates_args=())
def qsoftmax(x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor, format: str) -> Tensor:
    """QLinearSoftmax over the last axis: codes → codes. The kernel multiplies by the whole part of 1 / y_scale."""
    fmt, _ = parse_format(format)
    codes = x.to(torch.int64)
    most = x_scale.new_tensor(torch.finfo(torch.float32).max) / x.shape[-1]
    shift = max(0.0, float(torch.log(most)) - BELOW_OVERFLOW) / float(x_scale)  # in float32 up to here
    steps = torch.arange(256, dtype=torch.float64, device=x.device) - 255 + shift
    table = torch.exp(steps * x_scale.double()).float()
    weights = table[codes - codes.amax(-1, keepdim=True) + 255]
    total = torch.zeros_like(weights[..., 0])
    for part in weights.unbind(-1):
        total = total + part
    levels = torch.floor(1 / y_scale)
    result = torch.round(weights.double() * levels / total.unsqueeze(-1)) + y_zero
    return result.clamp(*fmt.limits()).to(fmt.storage)


@torch.library.custom_op("graphq::qavg_pool", mutates_args=())
def qavg_pool(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    format: str,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
) -> Tensor:
    """QLinearAveragePool: codes [n, c, …] → codes; a window is added position by position."""
    fmt, _ = parse_format(format)
    around = [p for p in reversed(padding) for _ in range(2)]
    value = torch.nn.functional.pad(_values(x, x_scale, x_zero), around)
    inside = torch.nn.functional.pad(torch.ones_like(x[:1, :1], dtype=torch.float32), around)
    total, count = _window_sum(value, kernel, stride), _window_sum(inside, kernel, stride)
    mean = total / (math.prod(kernel) if count_include_pad else count)
    result = torch.round(mean / y_scale + y_zero.float())
    return result.clamp(*fmt.limits()).to(fmt.storage)


def _window_sum(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Sums over windows of x [n, c, …], in the order of their positions."""
    sizes = [(d - k) // s + 1 for d, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    total = x.new_zeros(*x.shape[:2], *sizes)
    for offset in itertools.product(*map(range, kernel)):
        places = [slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offset, sizes, stride, strict=True)]
        total = total + x[(slice(None), slice(None), *places)]
    return total


@qmul.register_fake
def _(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero, format):  # type: ignore[no-untyped-def]
    return codes_like(a.float() + b.float(), format)


@qsigmoid.register_fake
def _(x, x_scale, x_zero, y_scale, y_zero, format):  # type: ignore[no-untyped-def]
    return codes_like(x, format)


@qleaky_relu.register_fake
def _(x, x_scale, x_zero, y_scale, y_zero, format, slope):  # type: ignore[no-untyped-def]
    return codes_like(x, format)


@qcat.register_fake
def _(tensors, scales, zeros, y_scale, y_zero, format, dim):  # type: ignore[no-untyped-def]
    return codes_like(torch.cat(tensors, dim), format)


@qwhere.register_fake
def _(condition, a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero, format):  # type: ignore[no-untyped-def]
    return codes_like(torch.where(condition, a.float(), b.float()), format)


@qsoftmax.register_fake
def _(x, x_scale, x_zero, y_scale, y_zero, format):  # type: ignore[no-untyped-def]
    return codes_like(x, format)


@qavg_pool.register_fake
def _(x, x_scale, x_zero, y_scale, y_zero, format, kernel, stride, padding, count_include_pad):  # type: ignore[no-untyped-def]
    sizes = [(d + 2 * p - k) // s + 1 for d, k, s, p in zip(x.shape[2:], kernel, stride, padding, strict=True)]
    return codes_like(x.new_empty(*x.shape[:2], *sizes), format)


QMUL = torch.ops.graphq.qmul.default
QSIGMOID = torch.ops.graphq.qsigmoid.default
QLEAKY_RELU = torch.ops.graphq.qleaky_relu.default
QWHERE = torch.ops.graphq.qwhere.default
QCAT = torch.ops.graphq.qcat.default
QSOFTMAX = torch.ops.graphq.qsoftmax.default
QAVG_POOL = torch.ops.graphq.qavg_pool.default
