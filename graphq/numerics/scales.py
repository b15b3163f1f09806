"""From a range of values to scale and zero point, for every kind of scale.

float   any float32: largest magnitude / largest code, or range / number of steps
pof2    the power of two nearest to that (AMD Quark's power-of-two scales)
e8m0    a power of two by the exponent of the largest magnitude (OCP Microscaling v1.0)
e4m3    fp8 e4m3, in units of one float32 scale per tensor (NVFP4)
e5m3    an unsigned float of 5 exponent and 3 mantissa bits (AMD Quark's amdfp4)
e5m3_global  the same in units of one float32 scale per tensor (amdfp4_global16)
bfp     a power of two at which no code overflows (AMD Quark's BFP16)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from graphq.numerics.formats import FORMATS, Floating, Format, Integer

ScaleKind = Literal["float", "pof2", "e8m0", "e4m3", "e5m3", "e5m3_global", "bfp"]
ScaleMode = Literal["floor", "ceil", "even", "cover"]
Span = Literal["positive", "full"]

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
SMALLEST_EXPONENT = -127  # of E8M0, which has no zero
E5M3 = Floating("e5m3", 8, False, torch.uint8, exponent=5, fraction=3, beyond="nan")
# kinds of block scales in units of a scale per tensor → their format, and what stands in for a scale that is rounded to
# zero (all values of such a block round to zero)
TWO_LEVEL: dict[str, tuple[Format, float]] = {"e4m3": (FORMATS["fp8_e4m3"], 0.125), "e5m3_global": (E5M3, 2.0**-17)}
BLOCK_KINDS = ("e5m3", *TWO_LEVEL)


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
    Computed in float64. mode: how "e8m0" rounds the exponent. overall: the largest magnitude of the tensor, for kinds
    of two levels; None: that of the given ranges. A range of zero width gets scale 1, never 0.
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
    elif scale == "e5m3":
        ideal = _rounded(ideal, E5M3, 2.0**-17)
    elif scale in TWO_LEVEL:
        ideal = ideal_in_units(ideal, fmt, amax.max() if overall is None else overall.double(), scale)
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


def units(overall: Tensor, fmt: Format, kind: str = "e4m3") -> Tensor:
    """The scale per tensor, as it is multiplied by: what brings the largest block scale to its format's largest value
    (NVFP4: 448)."""
    return torch.where(overall > 0, TWO_LEVEL[kind][0].largest * fmt.largest / overall, 1.0).float()


def ideal_in_units(ideal: Tensor, fmt: Format, overall: Tensor, kind: str = "e4m3") -> Tensor:
    """Block scales rounded to multiples of the tensor's unit in the format of their kind."""
    unit = units(overall, fmt, kind)
    blocks = _rounded(ideal * unit.double(), *TWO_LEVEL[kind])
    return (blocks.float() / unit).double()


def _rounded(ideal: Tensor, fmt: Format, instead_of_zero: float) -> Tensor:
    from graphq.numerics.floating import round_to_grid_

    assert isinstance(fmt, Floating)
    rounded = round_to_grid_(ideal.float(), fmt).double()
    return rounded.where(rounded > 0, instead_of_zero)


def _without_overflow(lo: Tensor, hi: Tensor, fmt: Format) -> Tensor:
    """The power of two at which the block's largest magnitude fills the codes, doubled where one would round beyond."""
    assert isinstance(fmt, Integer)
    _, exponent = torch.frexp(torch.maximum(-lo, hi))
    step = torch.exp2((exponent - 1 - (fmt.bits - 2)).double())
    over = (torch.round(hi / step) > fmt.qmax) | (torch.round(lo / step) < fmt.qmin)
    return torch.where(over, 2 * step, step)
