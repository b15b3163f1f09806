"""The table of number formats: integers, small floats, and the block formats that are made of them.

An element format says which values a code can have. A block format is an element format with one scale for each block
of values and a rule for that scale; `BLOCK_FORMATS` says which parts the known names stand for.

    name         element     block   scale                                               defined in
    mxfp8_e4m3   fp8_e4m3       32   E8M0: power of two                                  OCP Microscaling v1.0
    mxfp8_e5m2   fp8_e5m2       32   E8M0                                                OCP Microscaling v1.0
    mxfp6_e3m2   fp6_e3m2       32   E8M0                                                OCP Microscaling v1.0
    mxfp6_e2m3   fp6_e2m3       32   E8M0                                                OCP Microscaling v1.0
    mxfp4        fp4_e2m1       32   E8M0                                                OCP Microscaling v1.0
    mxint8       int8, narrow   32   E8M0; its codes are sixty-fourths of the shared     OCP Microscaling v1.0
                                     scale, which here is part of the scale
    nvfp4        fp4_e2m1       16   e4m3, over one float32 scale per tensor             NVFP4
    mx6, mx9     shared micro-  16   E8M0; each pair of values may be twice as fine      Darvish Rouhani et al., 2023
                 exponents                                                               (arXiv 2302.08007)
    bfp16        int8            8   power of two, grown where a code would overflow     AMD Quark, BFP16
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from graphq.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Format:
    """An element format, `bits` wide, whose codes are kept in tensors of dtype `storage`."""

    name: str
    bits: int
    signed: bool
    storage: torch.dtype

    @property
    def largest(self) -> float:
        """The largest value of a code."""
        raise NotImplementedError

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest)): by how much a power-of-two scale lies below the largest value of its block."""
        return math.floor(math.log2(self.largest))

    @property
    def mantissa(self) -> int:
        """Bits of the mantissa behind the leading one, at the largest exponent."""
        raise NotImplementedError

    def limits(self, narrow_range: bool = False) -> tuple[float, float]:
        """(lowest, highest) value of a code."""
        return (-self.largest if self.signed else 0.0), self.largest


@dataclass(frozen=True)
class Integer(Format):
    """Two's complement, or unsigned: codes in [qmin, qmax]."""

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - (1 if self.signed else 0))) - 1

    @property
    def largest(self) -> float:
        return float(self.qmax)

    @property
    def mantissa(self) -> int:
        return self.largest_exponent

    def limits(self, narrow_range: bool = False) -> tuple[int, int]:
        """(lowest, highest) code; a narrow signed range gives up its lowest code, so that it is symmetric."""
        return self.qmin + (1 if narrow_range and self.signed else 0), self.qmax


@dataclass(frozen=True)
class Floating(Format):
    """Sign, `exponent` bits with the usual bias 2^(exponent − 1) − 1, and `fraction` bits, with subnormals.

    beyond: what lies above the largest value: "inf" (as in IEEE 754), "nan" (fn formats), or nothing.
    """

    exponent: int
    fraction: int
    beyond: str = ""

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def smallest_exponent(self) -> int:
        """Of normal values; subnormals go in steps of 2^(smallest_exponent − fraction)."""
        return 1 - self.bias

    @property
    def largest(self) -> float:
        top = (1 << self.exponent) - (2 if self.beyond == "inf" else 1) - self.bias
        taken = 1 if self.beyond == "nan" else 0  # the highest mantissa of the highest exponent stands for NaN
        return math.ldexp((2 << self.fraction) - 1 - taken, top - self.fraction)

    @property
    def mantissa(self) -> int:
        return self.fraction


@dataclass(frozen=True)
class SharedExponents(Format):
    """Sign and `bits_of_magnitude`, in units of the scale; a pair with a value of 2^magnitude or more goes in twos."""

    magnitude: int

    @property
    def largest(self) -> float:
        return 2.0 * ((1 << self.magnitude) - 1)

    @property
    def mantissa(self) -> int:
        return self.magnitude


def _storage(bits: int, signed: bool) -> torch.dtype:
    if bits > 16:
        return torch.int32
    if bits > 8:
        return torch.int16 if signed else torch.uint16
    return torch.int8 if signed else torch.uint8


FORMATS: dict[str, Format] = {
    f.name: f
    for bits in (*range(2, 17), 32)
    for signed in ((True, False) if bits < 32 else (True,))
    for f in [Integer(f"{'' if signed else 'u'}int{bits}", bits, signed, _storage(bits, signed))]
} | {
    f.name: f
    for f in (
        Floating("float16", 16, True, torch.float16, 5, 10, "inf"),
        Floating("bfloat16", 16, True, torch.bfloat16, 8, 7, "inf"),
        Floating("fp8_e4m3", 8, True, torch.float8_e4m3fn, 4, 3, "nan"),
        Floating("fp8_e5m2", 8, True, torch.float8_e5m2, 5, 2, "inf"),
        Floating("fp6_e3m2", 6, True, torch.uint8, 3, 2),
        Floating("fp6_e2m3", 6, True, torch.uint8, 2, 3),
        Floating("fp4_e2m1", 4, True, torch.uint8, 2, 1),
        SharedExponents("mx6", 6, True, torch.int8, 4),
        SharedExponents("mx9", 9, True, torch.int16, 7),
    )
}  # fmt: skip

# name → the fields of a QuantSpec that it stands for
BLOCK_FORMATS: dict[str, dict[str, Any]] = {
    name: {"format": element, "granularity": "group", "group_size": group, "scale": scale, **more}
    for name, element, group, scale, more in (
        ("mxfp8_e4m3", "fp8_e4m3", 32, "e8m0", {}),
        ("mxfp8_e5m2", "fp8_e5m2", 32, "e8m0", {}),
        ("mxfp6_e3m2", "fp6_e3m2", 32, "e8m0", {}),
        ("mxfp6_e2m3", "fp6_e2m3", 32, "e8m0", {}),
        ("mxfp4", "fp4_e2m1", 32, "e8m0", {}),
        ("mxint8", "int8", 32, "e8m0", {"narrow_range": True}),
        ("nvfp4", "fp4_e2m1", 16, "e4m3", {}),
        ("mx6", "mx6", 16, "e8m0", {"scale_mode": "floor"}),
        ("mx9", "mx9", 16, "e8m0", {"scale_mode": "floor"}),
        ("bfp16", "int8", 8, "bfp", {}),
    )
}


def get_format(name: str) -> Format:
    """The element format of that name. Raises ConfigError with the nearest names."""
    if name not in FORMATS:
        raise ConfigError(f"unknown number format {name!r}", remedy=did_you_mean(name, {**FORMATS, **BLOCK_FORMATS}))
    return FORMATS[name]
