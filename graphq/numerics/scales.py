"""From a range of values to scale and zero point, for every kind of scale.

float   any float32: largest magnitude / largest code, or range / number of steps
pof2    the power of two nearest to that (AMD Quark's power-of-two scales)
e8m0    a power of two by the exponent of the largest magnitude (OCP Microscaling v1.0)
e4m3    fp8 e4m3, in units of one float32 scale per tensor (NVFP4)
bfp     a power of two at which no code overflows (AMD Quark's BFP16)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from graphq.numerics.formats import FORMATS, Floating, Format, Integer

ScaleKind = Literal["float", "pof2", "e8m0", "e4m3", "bfp"]
ScaleMode = Literal["floor", "ceil", "even", "cover"]
Span = Literal["positive", "full"]

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
SMALLEST_EXPONENT = -127  # of E8M0, which has no zero
E4M3 = FORMATS["fp8_e4m3"]
ZERO_E4M3 = 0.125  # stands in for a block scale that is rounded to zero; all values of such a block round to zero


def choose_qparams(
    lo: Tensor,
    hi: Tensor,
    fmt: Format,
    *,
    symmetric: bool,
    narrow_range: bool = False,
    scale: ScaleKind = "float",
    mode: ScaleMode = "even",
    span: Span = "positive",
    overall: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) that cover [lo, hi], zero included.

    Symmetric: scale = max(|lo|, |hi|) / qmax, zero point 0 (the middle code for unsigned formats); span "full" divides
    by (qmax - qmin) / 2 instead. Affine: scale = (hi - lo) / (qmax - qmin), zero point = round(qmin - lo / scale).
    Computed in float64. mode: how "e8m0" rounds the exponent. overall: the largest magnitude of the tensor, for "e4m3";
    None: that of the given ranges. A range of zero width gets scale 1, never 0.
    """
    lo, hi = lo.double().clamp(max=0), hi.double().clamp(min=0)
    amax = torch.maximum(-lo, hi)
    if isinstance(fmt, Integer) and not symmetric:
        return _affine(lo, hi, fmt, narrow_range, power_of_two=scale == "pof2")
    middle = 0.0 if fmt.signed or not isinstance(fmt, Integer) else (fmt.qmax + 1) // 2
    lowest, highest = fmt.limits(narrow_range)
    ideal = amax / ((highest - lowest) / 2 if span == "full" else highest - middle)
    if scale == "pof2":
        ideal = torch.exp2(torch.round(torch.log2(2 * amax / (highest - lowest))))
    elif scale == "e8m0":
        ideal = shared_exponent(amax, fmt, mode)
    elif scale == "bfp":
        ideal = _without_overflow(lo, hi, fmt)
    elif scale == "e4m3":
        ideal = ideal_in_units(ideal, fmt, amax.max() if overall is None else overall.double())
    dead = (amax == 0) | (ideal < (2.0**SMALLEST_EXPONENT if scale == "e8m0" else SMALLEST_SCALE))
    chosen = torch.where(dead, torch.ones_like(ideal), ideal).float()
    return chosen, torch.full_like(chosen, middle, dtype=torch.int32)


def _affine(lo: Tensor, hi: Tensor, fmt: Integer, narrow: bool, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    qmin, qmax = fmt.limits(narrow)
    scale = (hi - lo) / (qmax - qmin)
    exact = qmin - lo / scale.where(scale > 0, 1)
    zero_point = (torch.trunc(exact) if power_of_two else torch.round(exact)).clamp(qmin, qmax)
    if power_of_two:
        scale = torch.exp2(torch.round(torch.log2(scale)))
    dead = scale < SMALLEST_SCALE
    zero_point = torch.where(dead, torch.full_like(zero_point, max(qmin, 0)), zero_point)
    return torch.where(dead, torch.ones_like(scale), scale).float(), zero_point.to(torch.int32)


def shared_exponent(amax: Tensor, fmt: Format, mode: ScaleMode) -> Tensor:
    """2^e [as amax]: e = floor(log2(amax)) less the exponent of the format's largest value, within [-127, 127].

    Mode "floor" is OCP's. "ceil" rounds log2 up. "even" rounds amax to the mantissa of the format first, so that the
    largest value is not clipped where it would round to the next power of two. "cover" is the smallest at which nothing
    is clipped at all: ceil(log2(amax / largest)).
    """
    mantissa, exponent = torch.frexp(amax)  # amax = mantissa · 2^exponent, mantissa in [0.5, 1)
    exponent = exponent - 1
    if mode == "ceil":
        exponent = exponent + (mantissa > 0.5)
    elif mode == "even":  # half a unit in the last place reaches the next power of two
        exponent = exponent + (mantissa >= 1 - 2.0 ** -(fmt.mantissa + 2))
    elif mode == "cover":
        unit = 2.0**-fmt.largest_exponent
        exponent = exponent + (amax > torch.ldexp(torch.full_like(amax, fmt.largest * unit), exponent))
    exponent = (exponent - fmt.largest_exponent).clamp(SMALLEST_EXPONENT, 127)
    return torch.exp2(exponent.double())


def units(overall: Tensor, fmt: Format) -> Tensor:
    """NVFP4's scale per tensor, as it is multiplied by: what brings the largest block scale to e4m3's largest value."""
    return torch.where(overall > 0, E4M3.largest * fmt.largest / overall, 1.0).float()


def ideal_in_units(ideal: Tensor, fmt: Format, overall: Tensor) -> Tensor:
    """Block scales rounded to e4m3 multiples of the tensor's unit."""
    from graphq.numerics.floating import round_to_grid_

    assert isinstance(E4M3, Floating)
    unit = units(overall, fmt)
    blocks = round_to_grid_((ideal * unit.double()).float(), E4M3)
    return (blocks.where(blocks > 0, ZERO_E4M3) / unit).double()


def _without_overflow(lo: Tensor, hi: Tensor, fmt: Format) -> Tensor:
    """The power of two at which the block's largest magnitude fills the codes, doubled where one would round beyond."""
    assert isinstance(fmt, Integer)
    _, exponent = torch.frexp(torch.maximum(-lo, hi))
    step = torch.exp2((exponent - 1 - (fmt.bits - 2)).double())
    over = (torch.round(hi / step) > fmt.qmax) | (torch.round(lo / step) < fmt.qmin)
    return torch.where(over, 2 * step, step)
