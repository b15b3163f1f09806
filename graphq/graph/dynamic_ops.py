"""Products whose inputs are quantized at run time, as ONNX Runtime computes them.

    dynamic_qgemm(x, w, w_scale, w_zero, bias)         DynamicQuantizeMatMul
    token_qgemm(x, w, w_scale, w_zero, steps)          MatMulInteger, around it the scale of every token

x: float32 […, in], rounded to uint8 with the scale and zero point of DynamicQuantizeLinear, one of each for the whole
tensor; w: int8 or uint8 codes [in, out]; w_scale: float32 [] or [out]; w_zero: codes' dtype, of the same shape; bias:
float32 [out]. The result is float32. token_qgemm rounds each row of x to int8 with the scale largest magnitude / steps,
and gives the kernel uint8 codes with zero point 128. saturating: see `graphq.graph.integer_ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.graph.integer_ops import exact_dtype
from graphq.numerics.pairs import lost_to_int16


def dynamic_uint8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes less their zero point, as floats; scale; zero point) as ONNX's DynamicQuantizeLinear finds them, in
    float32."""
    lo, hi = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (hi - lo) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round((-lo / scale).clamp(0, 255))
    return torch.round((x / scale).clamp(-zero, 255 - zero)), scale, zero


@torch.library.custom_op("graphq::dynamic_qgemm", mutates_args=())
def dynamic_qgemm(
    x: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, bias: Tensor | None, saturating: bool = False
) -> Tensor:
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], w.shape[1])
    centered, scale, zero = dynamic_uint8(x)
    total = _product(centered, centered + zero, w, w_zero, saturating)
    result = total.float() * (scale * w_scale)
    return result if bias is None else result + bias


def _product(centered: Tensor, codes: Tensor, w: Tensor, w_zero: Tensor, saturating: bool) -> Tensor:
    """Codes less their zero points multiplied, exactly, or with the int16 sums of pairs."""
    weights = (w.to(torch.int32) - w_zero.to(torch.int32)).t()
    dtype = exact_dtype(weights)
    total = torch.nn.functional.linear(centered.to(dtype), weights.to(dtype))
    if saturating and w.dtype == torch.int8:
        loss = lost_to_int16(codes.reshape(-1, codes.shape[-1]).to(dtype), w.t().to(dtype))
        total = total.double() + loss.reshape(total.shape)
    return total


@dynamic_qgemm.register_fake
def _(x: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, bias: Tensor | None, saturating: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[1])


@torch.library.custom_op("graphq::token_qgemm", mutates_args=())
def token_qgemm(
    x: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, steps: float, saturating: bool = False
) -> Tensor:
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], w.shape[1])
    scale = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST) / steps
    centered = torch.round(x / scale).clamp(-128, 127)
    total = _product(centered, centered + 128, w, w_zero, saturating)
    return total.float() * scale * w_scale


@token_qgemm.register_fake
def _(x: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, steps: float, saturating: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[1])


SMALLEST = 1e-30  # of a token's largest magnitude: one of zeros has a scale too
TOKEN_QGEMM = torch.ops.graphq.token_qgemm.default
DYNAMIC_QGEMM = torch.ops.graphq.dynamic_qgemm.default
