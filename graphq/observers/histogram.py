"""A histogram of bounded size over data of unknown range; what percentile, MSE and entropy look at.

The bins cover [-2^k, 2^k) in equal widths. A value beyond it doubles the range: pairs of bins are merged about zero,
which is exact, so that the order of the data does not matter and two histograms add up without loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphq.numerics.affine import blocks_of
from graphq.observers.base import MASK_VALUE, finite_range, nothing_seen

BINS = 8192
SAMPLE = 1 << 15  # values counted of a tensor per update; extremes are taken of all of them
SMALLEST = -126  # exponent of the smallest range: below it float32 is denormal


class Histogram:
    """Counts [blocks, BINS] (float64) over [-2^exponent, 2^exponent), with the exact extremes of each block."""

    def __init__(self, block: tuple[int, ...]) -> None:
        self.block = block
        self.exponent = SMALLEST
        self.counts: Tensor | None = None
        self.lo: Tensor
        self.hi: Tensor
        self.grid: torch.Size  # blocks along each dimension
        self._random = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Count the values of one more tensor."""
        kept, lo, hi = finite_range(x.detach())
        if kept.shape != x.shape and self.block:
            kept = x.masked_fill(~(x > MASK_VALUE), 0.0)
        parts = blocks_of(kept.float(), self.block)
        grid, rows = parts.shape[:-1], parts.reshape(-1, parts.shape[-1])
        if self.block:
            row_lo, row_hi = (v.clamp(max=0) if i == 0 else v.clamp(min=0) for i, v in enumerate(rows.aminmax(dim=1)))
        else:
            row_lo = torch.tensor([min(lo, 0.0)], device=x.device)
            row_hi = torch.tensor([max(hi, 0.0)], device=x.device)
        if self.counts is None:
            self.counts = torch.zeros(len(rows), BINS, dtype=torch.float64, device=x.device)
            self.lo, self.hi, self.grid = row_lo, row_hi, grid
        self._grow(math.frexp(max(-lo, hi, 0.0))[1])
        self.lo, self.hi = torch.minimum(self.lo, row_lo), torch.maximum(self.hi, row_hi)
        self.counts += self._count(rows)

    def _count(self, rows: Tensor) -> Tensor:
        limit = 2.0**self.exponent
        if len(rows) == 1:
            return self._count_sample(rows[0], limit)[None]
        index = ((rows / limit + 1) * (BINS // 2)).long().clamp(0, BINS - 1)
        counts = torch.zeros(len(rows), BINS, dtype=torch.float64, device=rows.device)
        return counts.scatter_add_(1, index, torch.ones((), dtype=torch.float64, device=rows.device).expand_as(index))

    def _count_sample(self, values: Tensor, limit: float) -> Tensor:
        """Of a large tensor a fixed-size random sample, weighted to stand for all, and its two extremes."""
        if values.numel() <= SAMPLE:
            return torch.histc(values, BINS, -limit, limit).double()
        index = torch.randint(values.numel(), (SAMPLE,), generator=self._random).to(values.device)
        counts = torch.histc(values[index], BINS, -limit, limit).double() * (values.numel() / SAMPLE)
        return counts + torch.histc(torch.stack(values.aminmax()), BINS, -limit, limit)

    def _grow(self, exponent: int) -> None:
        """Widen the range to ±2^exponent by merging bins about zero."""
        assert self.counts is not None
        steps = exponent - self.exponent
        if steps <= 0:
            return
        self.exponent = exponent
        if not self.counts.any():
            return
        for _ in range(min(steps, BINS.bit_length())):
            merged = self.counts.view(len(self.counts), BINS // 2, 2).sum(-1)
            self.counts = torch.nn.functional.pad(merged, [BINS // 4, BINS // 4])

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        if other.counts is None:
            return
        if self.counts is None:
            self.counts, self.exponent = other.counts.clone(), other.exponent
            self.lo, self.hi, self.grid = other.lo.clone(), other.hi.clone(), other.grid
            return
        mine = Histogram(other.block)
        mine.counts, mine.exponent = other.counts.clone(), other.exponent
        mine._grow(self.exponent)
        self._grow(mine.exponent)
        self.counts = self.counts + mine.counts
        self.lo, self.hi = torch.minimum(self.lo, other.lo), torch.maximum(self.hi, other.hi)

    def filled(self) -> Tensor:
        """The counts. Raises CalibrationError when nothing has been seen."""
        if self.counts is None:
            raise nothing_seen()
        return self.counts

    def centers(self) -> Tensor:
        """Middle of every bin [BINS], float64."""
        limit = 2.0**self.exponent
        width = 2 * limit / BINS
        device = self.filled().device
        return torch.arange(BINS, dtype=torch.float64, device=device) * width + (width / 2 - limit)

    def shaped(self, per_block: Tensor) -> Tensor:
        """A value per row, in the shape of a scale."""
        return per_block.float().reshape(self.grid) if self.block else per_block.float().reshape(())
