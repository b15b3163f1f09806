"""Affine integer quantization: `code = clamp(round(x / scale) + zero_point)`, per tensor, channel, group or block.

One block shape expresses every granularity. `block` has an entry per dimension of the tensor: the number of
elements of that dimension that share a scale, or -1 for all of them; an empty block means the whole tensor.

    weight [out, in]       block        scale
    per tensor             ()           []
    per channel (axis 0)   (1, -1)      [out, 1]
    per group of 128       (1, 128)     [out, ceil(in / 128)]
    2-D block              (128, 128)   [ceil(out / 128), ceil(in / 128)]

The last block of a dimension may be ragged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from graphq.numerics.formats import Format

SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def blocks_of(x: Tensor, block: Sequence[int]) -> Tensor:
    """View `x` as [number of blocks along each dimension …, elements of a block]; ragged ends are filled with zero."""
    if not block:
        return x.reshape(1, -1)
    sizes = [d if b == -1 else b for d, b in zip(x.shape, block, strict=True)]
    pad: list[int] = []
    for d, b in zip(reversed(x.shape), reversed(sizes), strict=True):
        pad += [0, -d % b if b else 0]
    x = torch.nn.functional.pad(x, pad) if any(pad) else x
    counts = [d // b if b else 0 for d, b in zip(x.shape, sizes, strict=True)]
    split = x.reshape([n for pair in zip(counts, sizes, strict=True) for n in pair])
    rank = len(sizes)
    return split.permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)).reshape(*counts, -1)


def expand(param: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """Broadcast a scale or zero point, one entry per block, against a tensor of `shape`."""
    if not block:
        return param.reshape(())
    for dim, (size, b) in enumerate(zip(shape, block, strict=True)):
        if b not in (-1, 1) and param.shape[dim] > 1:
            param = param.repeat_interleave(b, dim).narrow(dim, 0, int(size))
    return param


def range_of(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every block, zero always included."""
    parts = blocks_of(x, block)
    lo, hi = parts.aminmax(dim=-1)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    return (lo, hi) if block else (lo.reshape(()), hi.reshape(()))


def choose_qparams(
    lo: Tensor, hi: Tensor, fmt: Format, *, symmetric: bool, narrow_range: bool = False
) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) that cover [lo, hi], zero included exactly.

    Symmetric: scale = max(|lo|, |hi|) / qmax, zero point 0 (the middle code for unsigned formats).
    Affine: scale = (hi - lo) / (qmax - qmin), zero point = round(qmin - lo / scale), computed in float64.
    A range of zero width gets scale 1, never 0.
    """
    qmin, qmax = fmt.limits(narrow_range)
    lo, hi = lo.double().clamp(max=0), hi.double().clamp(min=0)
    if symmetric:
        middle = 0 if fmt.signed else (qmax + 1) // 2
        scale = torch.maximum(-lo, hi) / (qmax - middle)
        zero_point = torch.full_like(scale, middle)
    else:
        scale = (hi - lo) / (qmax - qmin)
        zero_point = torch.round(qmin - lo / scale.where(scale > 0, 1)).clamp(qmin, qmax)
    dead = scale < SMALLEST_SCALE
    scale = torch.where(dead, torch.ones_like(scale), scale).float()
    if not symmetric:
        zero_point = torch.where(dead, torch.full_like(zero_point, max(qmin, 0)), zero_point)
    return scale, zero_point.to(torch.int32)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], fmt: Format, *, narrow_range: bool = False
) -> Tensor:
    """Codes of `x` in `fmt.storage`; rounds half to even, saturates (ONNX QuantizeLinear)."""
    qmin, qmax = fmt.limits(narrow_range)
    scale, zero_point = expand(scale, x.shape, block), expand(zero_point, x.shape, block)
    codes = torch.round(x.float() / scale) + zero_point
    return codes.clamp(qmin, qmax).to(fmt.storage)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int]) -> Tensor:
    """`(codes - zero_point) · scale` in float32 (ONNX DequantizeLinear)."""
    scale, zero_point = expand(scale, codes.shape, block), expand(zero_point, codes.shape, block)
    return (codes.to(torch.int32) - zero_point.to(torch.int32)).float() * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], fmt: Format, *, narrow_range: bool = False
) -> Tensor:
    """Quantize and dequantize in one go, without leaving float; the dtype of `x` is kept."""
    qmin, qmax = fmt.limits(narrow_range)
    scale, zero_point = expand(scale, x.shape, block), expand(zero_point, x.shape, block)
    codes = (torch.round(x.float() / scale) + zero_point).clamp(qmin, qmax)
    return ((codes - zero_point) * scale).to(x.dtype)


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB, accumulated in float64; inf when equal."""
    signal = reference.double().square().sum().item()
    noise = (reference.double() - approximation.double()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
