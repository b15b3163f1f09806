"""Quantization: `code = clamp(round(x / scale) + zero_point)`, per tensor, channel, group or block, for every format.

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

from graphq.errors import ConfigError
from graphq.numerics.floating import decode, encode, round_to_grid_
from graphq.numerics.formats import Floating, Format, SharedExponents
from graphq.numerics.microscaling import round_pairs_
from graphq.numerics.rounding import ROUND, Rounding

MASK_VALUE = -1e30  # additive attention masks are -inf or the lowest float; no activation reaches this
LARGEST_INT32 = 2**31 - 128  # the largest float32 that an int32 holds
CACHED = 1 << 19  # float32 values


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


def unmasked_range(x: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`range_of` without additive masks (-inf, or the lowest floats): what a dynamic range is found from."""
    x = x.float()
    if x.numel() == 0:
        sizes = [1 if b == -1 else -(-d // b) for d, b in zip(x.shape, block, strict=True)] if block else []
        return x.new_zeros(sizes), x.new_zeros(sizes)
    return range_of(x.masked_fill(x <= MASK_VALUE, 0.0), block)


def check_divides(shape: Sequence[int], block: Sequence[int], where: str | None = None) -> None:
    """Raises ConfigError where the last block of a dimension would be ragged."""
    for dim, (size, b) in enumerate(zip(shape, block, strict=True) if block else ()):
        if b > 1 and size % b:
            raise ConfigError(
                f"{size} values along dimension {dim} are no multiple of {b}",
                where=where,
                remedy="Choose a group size that divides it, another axis, or ragged: true, which fills up with zeros.",
            )


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    block: Sequence[int],
    fmt: Format,
    *,
    narrow_range: bool = False,
    rounding: Rounding = "half_even",
    saturate: bool = True,
) -> Tensor:
    """Codes of `x` in `fmt.storage` (ONNX QuantizeLinear: half to even, saturating, if not told otherwise)."""
    _check_pairs(fmt, block)
    values, scale, zero_point = _aligned(x, scale, zero_point, block)
    ratio = values / scale
    codes = _round_(ratio.clone(), zero_point, fmt, narrow_range, rounding, saturate)
    if isinstance(fmt, Floating):
        return encode(codes.copysign_(ratio), fmt).reshape(x.shape)
    return (codes + zero_point).to(fmt.storage).reshape(x.shape)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], fmt: Format) -> Tensor:
    """`(codes - zero_point) · scale` in float32 (ONNX DequantizeLinear)."""
    if isinstance(fmt, Floating):
        values = decode(codes, fmt)
    else:
        values = (codes.to(torch.int32) - expand(zero_point, codes.shape, block).to(torch.int32)).float()
    return values * expand(scale, codes.shape, block)


@torch.no_grad()
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    block: Sequence[int],
    fmt: Format,
    *,
    narrow_range: bool = False,
    rounding: Rounding = "half_even",
    saturate: bool = True,
) -> Tensor:
    """Quantize and dequantize in one go, without leaving float; the dtype of `x` is kept. No gradients: see `ste`."""
    _check_pairs(fmt, block)
    values, scale, zero_point = _aligned(x, scale, zero_point, block)
    result = torch.empty_like(values, dtype=torch.float32, memory_format=torch.contiguous_format)
    for part in _parts(values):
        s, zero, out = _rows(scale, part), _rows(zero_point, part), result[part]
        torch.div(values[part], s, out=out)
        _round_(out, zero, fmt, narrow_range, rounding, saturate).mul_(s)
    return result.reshape(x.shape).to(x.dtype)


def _round_(ratio: Tensor, zero_point: Tensor, fmt: Format, narrow: bool, rounding: Rounding, saturate: bool) -> Tensor:
    """Round x / scale in place to what the codes say of it: code - zero point, or the value of a float code."""
    if isinstance(fmt, Floating):
        return round_to_grid_(ratio, fmt, rounding, saturate=saturate)
    if isinstance(fmt, SharedExponents):
        return round_pairs_(ratio, fmt, rounding)
    lowest, highest = fmt.limits(narrow)
    highest = min(highest, LARGEST_INT32)
    return ROUND[rounding](ratio).clamp_(lowest - zero_point, highest - zero_point)


def _check_pairs(fmt: Format, block: Sequence[int]) -> None:
    if isinstance(fmt, SharedExponents) and (not block or block[-1] < 2 or block[-1] % 2):
        raise ConfigError(
            f"{fmt.name} shares exponents between neighbours along the last axis, and blocks are {list(block)}",
            remedy="Use groups of an even size along the last axis.",
        )


def _aligned(x: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scale, zero point) that broadcast. Where blocks divide the tensor, it is viewed as [blocks, elements of
    a block, …] dimension by dimension; else the parameters are repeated."""
    x = x if x.dtype == torch.float32 else x.float()
    if not block:
        return x, scale.reshape(()), zero_point.reshape(())
    sizes = [d if b == -1 else b for d, b in zip(x.shape, block, strict=True)]
    if all(b in (-1, 1) for b in block):
        return x, scale, zero_point
    if x.numel() == 0 or any(d % b for d, b in zip(x.shape, sizes, strict=True)):
        return x, expand(scale, x.shape, block), expand(zero_point, x.shape, block)
    split = [n for d, b in zip(x.shape, sizes, strict=True) for n in ((d // b, b) if b > 1 else (d,))]
    single = [n for d, b in zip(x.shape, sizes, strict=True) for n in ((d // b, 1) if b > 1 else (d,))]
    return x.reshape(split), scale.reshape(single), zero_point.reshape(single)


def _parts(values: Tensor) -> list[slice]:
    """Rows of a tensor, so many at a time that they stay in a CPU's cache from one step to the next."""
    if values.ndim == 0 or values.numel() <= CACHED or values.device.type != "cpu":
        return [slice(None)] if values.ndim else [...]  # type: ignore[list-item]
    step = max(1, CACHED * len(values) // values.numel())
    return [slice(i, i + step) for i in range(0, len(values), step)]


def _rows(param: Tensor, part: slice) -> Tensor:
    return param[part] if param.ndim and len(param) > 1 else param


def sqnr(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in dB, accumulated in float64; inf when equal."""
    signal = reference.double().square().sum().item()
    noise = (reference.double() - approximation.double()).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
