"""Small floats: rounding onto their grid, and the bit patterns of their codes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from graphq.numerics.formats import Floating
from graphq.numerics.rounding import ROUND, Rounding

EXPONENT = 0x7F800000  # of a float32: masked with it, a normal value leaves the power of two at or below it
FLOAT32_LARGEST = torch.finfo(torch.float32).max


def round_to_grid_(x: Tensor, fmt: Floating, rounding: Rounding = "half_even", *, saturate: bool = True) -> Tensor:
    """Round float32 values in place to values of the format; NaN stays NaN.

    saturate: what is beyond the largest value becomes it; otherwise what the format has there (infinity, or NaN), and
    the largest value where it has nothing.
    """
    saturate = saturate or not fmt.beyond
    if saturate:
        x.clamp_(-fmt.largest, fmt.largest)
    if rounding == "half_even" and fmt.bits == 16:
        return x.copy_(x.to(fmt.storage))
    if not saturate:
        x.clamp_(*(sign * min(2 * fmt.largest, FLOAT32_LARGEST) for sign in (-1, 1)))
    power = x.view(torch.int32).bitwise_and(EXPONENT).view(torch.float32).clamp_(min=2.0**fmt.smallest_exponent)
    if rounding == "half_even":
        # in the binade of this number the unit in the last place is the step of the grid
        power.mul_(1.5 * 2.0 ** (23 - fmt.fraction))
        x.add_(power).sub_(power)
    else:
        step = power.mul_(2.0**-fmt.fraction)
        ROUND[rounding](x.div_(step)).mul_(step)
    if saturate:
        return x if rounding == "half_even" else x.clamp_(-fmt.largest, fmt.largest)
    beyond = torch.full_like(x, float(fmt.beyond)).copysign_(x)
    return x.copy_(torch.where(x.abs() > fmt.largest, beyond, x))


@cache
def magnitudes(fmt: Floating) -> Tensor:
    """The value of every code without its sign [2^(bits − 1)], float32, of a format that has no infinity and no NaN."""
    codes = torch.arange(1 << (fmt.bits - 1))
    exponent, fraction = codes >> fmt.fraction, (codes & ((1 << fmt.fraction) - 1)).double()
    normal = (1 + fraction / (1 << fmt.fraction)) * 2.0 ** (exponent - fmt.bias).double()
    subnormal = fraction * 2.0 ** (fmt.smallest_exponent - fmt.fraction)
    values = torch.where(exponent > 0, normal, subnormal)
    return values.float()


def encode(values: Tensor, fmt: Floating) -> Tensor:
    """Codes of values that are on the grid: `fmt.storage`, bit patterns in uint8 where torch has no such dtype."""
    if fmt.storage != torch.uint8:
        return values.to(fmt.storage)
    codes = torch.bucketize(values.abs(), magnitudes(fmt).to(values.device)).to(torch.uint8)
    return codes | (torch.signbit(values).to(torch.uint8) << (fmt.bits - 1))


def decode(codes: Tensor, fmt: Floating) -> Tensor:
    """The values of codes, float32."""
    if fmt.storage != torch.uint8:
        return codes.float()
    sign = 1 << (fmt.bits - 1)
    values = magnitudes(fmt).to(codes.device)[(codes & (sign - 1)).long()]
    return torch.where((codes & sign) > 0, -values, values)
