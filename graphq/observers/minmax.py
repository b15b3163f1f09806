"""Running extremes, and their moving average."""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.config.spec import QuantSpec
from graphq.numerics.affine import MASK_VALUE, range_of
from graphq.observers.base import OBSERVERS, finite_range, nothing_seen


def batch_range(x: Tensor, block: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Extremes of one tensor per block, mask values left out."""
    kept, lo, hi = finite_range(x)
    if not block:
        return torch.tensor(min(lo, 0.0), device=x.device), torch.tensor(max(hi, 0.0), device=x.device)
    if kept.shape != x.shape:
        x = x.masked_fill(~(x > MASK_VALUE), 0.0)
    return range_of(x.float(), block)


@OBSERVERS.register("minmax")
class MinMax:
    """The smallest and the largest value ever seen."""

    def __init__(self, spec: QuantSpec, block: tuple[int, ...]) -> None:
        self.block = block
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def update(self, x: Tensor) -> None:
        self._take(*batch_range(x, self.block))

    def merge(self, other: MinMax) -> None:
        if other.lo is not None and other.hi is not None:
            self._take(other.lo, other.hi)

    def _take(self, lo: Tensor, hi: Tensor) -> None:
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def range(self) -> tuple[Tensor, Tensor]:
        if self.lo is None or self.hi is None:
            raise nothing_seen()
        return self.lo, self.hi


@OBSERVERS.register("moving_average")
class MovingAverage:
    """Exponential moving average of each batch's extremes: r ← r + rate · (batch − r)."""

    def __init__(self, spec: QuantSpec, block: tuple[int, ...], rate: float = 0.1) -> None:
        self.block, self.rate = block, rate
        self.batches = 0
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of one batch."""
        return batch_range(x, self.block)

    def update(self, x: Tensor) -> None:
        lo, hi = self.batch(x)
        self.batches += 1
        if self.lo is None or self.hi is None:
            self.lo, self.hi = lo, hi
        else:
            self.lo, self.hi = self.lo.lerp(lo, self.rate), self.hi.lerp(hi, self.rate)

    def merge(self, other: MovingAverage) -> None:
        """Averages of two streams have no order: they are weighted by the batches seen."""
        if other.lo is None or other.hi is None:
            return
        if self.lo is None or self.hi is None:
            self.lo, self.hi, self.batches = other.lo, other.hi, other.batches
            return
        share = other.batches / (self.batches + other.batches)
        self.lo, self.hi = self.lo.lerp(other.lo, share), self.hi.lerp(other.hi, share)
        self.batches += other.batches

    def range(self) -> tuple[Tensor, Tensor]:
        if self.lo is None or self.hi is None:
            raise nothing_seen()
        return self.lo, self.hi
