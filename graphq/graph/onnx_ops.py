"""Ops of ONNX's own form. Two of them are what lowering for ONNX runtimes makes of graphq::quantize and dequantize:

    quantize_linear(x, scale, zero_point) → codes                         per tensor
    dequantize_linear(codes, scale, zero_point, axis) → float32           per tensor (scalar scale) or per axis

They mean exactly what ONNX's QuantizeLinear and DequantizeLinear mean; the zero point carries the dtype of the codes.
global_average_pool(x [n, c, …]) is ONNX's GlobalAveragePool, which torch.onnx would write as a ReduceMean, and
sum_of_two(a, b) is its Sum, which means what Add means.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("graphq::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    limits = torch.iinfo(zero_point.dtype)
    codes = torch.round(x / scale) + zero_point.to(torch.int32)
    return codes.clamp(limits.min, limits.max).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("graphq::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    if scale.ndim:
        shape = [-1 if d == axis else 1 for d in range(codes.ndim)]
        scale, zero_point = scale.view(shape), zero_point.view(shape)
    return (codes.to(torch.int32) - zero_point.to(torch.int32)).float() * scale


@dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("graphq::global_average_pool", mutates_args=())
def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(dim=list(range(2, x.ndim)), keepdim=True)


@global_average_pool.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:2], *[1] * (x.ndim - 2))


@torch.library.custom_op("graphq::sum_of_two", mutates_args=())
def sum_of_two(a: Tensor, b: Tensor) -> Tensor:
    return a + b


@sum_of_two.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a + b


QUANTIZE_LINEAR = torch.ops.graphq.quantize_linear.default
DEQUANTIZE_LINEAR = torch.ops.graphq.dequantize_linear.default
GLOBAL_AVERAGE_POOL = torch.ops.graphq.global_average_pool.default
SUM = torch.ops.graphq.sum_of_two.default
