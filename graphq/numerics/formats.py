"""The table of number formats."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphq.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Format:
    """An integer format: `bits` wide, codes in [qmin, qmax], kept in tensors of dtype `storage`."""

    name: str
    bits: int
    signed: bool
    storage: torch.dtype

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - (1 if self.signed else 0))) - 1

    def limits(self, narrow_range: bool = False) -> tuple[int, int]:
        """(lowest, highest) code; a narrow signed range gives up its lowest code, so that it is symmetric."""
        return self.qmin + (1 if narrow_range and self.signed else 0), self.qmax


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
    for f in [Format(f"{'' if signed else 'u'}int{bits}", bits, signed, _storage(bits, signed))]
}


def get_format(name: str) -> Format:
    """The format of that name. Raises ConfigError with the nearest names."""
    if name not in FORMATS:
        raise ConfigError(f"unknown number format {name!r}", remedy=did_you_mean(name, FORMATS))
    return FORMATS[name]
