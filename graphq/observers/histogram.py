"""A histogram of bounded size over data of unknown range; what percentile, MSE and entropy look at.

The bins cover [-2^k, 2^k) in equal widths. A value beyond it doubles the range: pairs of bins are merged about zero,
which is exact, so that the order of the data does not matter and two histograms add up without loss.
"""

from __future__ import annotations

import math
import struct
import zlib

import torch
from torch import Tensor

from graphq.numerics.affine import blocks_of
from graphq.observers.base import MASK_VALUE, as_stored, finite_range, nothing_seen

BINS = 4096
SAMPLE = 1 << 13  # enough of a tensor, batch after batch, for a search of the least error; extremes are of all values
FLUSH = 1 << 15  # values that wait to be counted together
SMALLEST = -126  # exponent of the smallest range: below it float32 is denormal


class Histogram:
    """Counts [blocks, BINS] (float64) over [-2^exponent, 2^exponent), with the exact extremes of each block."""

    def __init__(self, block: tuple[int, ...], sample: int | None = None) -> None:
        """sample: of a larger tensor count about so many values (with a scale per tensor); None counts all."""
        self.block, self.sample = block, sample
        self.exponent = SMALLEST
        self.counts: Tensor | None = None
        self.lo: Tensor
        self.hi: Tensor
        self.grid: torch.Size  # blocks along each dimension
        self._step = 0  # one value of so many is counted; fixed by the first tensor, so that all weigh the same
        self._buffer: Tensor  # values that wait to be counted: one block of memory for all of the calibration
        self._waiting = 0
        self._extremes: list[float] = []  # a sample may miss them

    def add(self, x: Tensor) -> None:
        """Take in the values of one more tensor."""
        kept, lo, hi = finite_range(x.detach())
        if self.block:
            self._add_blocks(x if kept.shape == x.shape else x.masked_fill(~(x > MASK_VALUE), 0.0))
            return
        if self.counts is None:
            self._start(1, torch.Size([1]), x.device)
            self._step = _coprime_step(kept.numel(), self.sample) if self.sample else 1
            self._buffer = torch.empty(FLUSH, device=x.device)
        self._grow(_exponent(lo, hi))
        sample = as_stored(kept).reshape(-1)[_offset(lo, hi) % self._step :: self._step]
        assert self.counts is not None
        self._extremes += [lo, hi]
        if self._waiting + len(sample) > FLUSH:
            self._flush()
        if len(sample) > FLUSH:
            self.counts[0] += self._count(sample)
        else:
            self._buffer[self._waiting : self._waiting + len(sample)] = sample
            self._waiting += len(sample)

    def _count(self, values: Tensor) -> Tensor:
        limit = 2.0**self.exponent
        return torch.histc(values.float(), BINS, -limit, limit)

    def _start(self, rows: int, grid: torch.Size, device: torch.device) -> None:
        self.counts = torch.zeros(rows, BINS, dtype=torch.float64, device=device)
        self.lo, self.hi, self.grid = torch.zeros(rows, device=device), torch.zeros(rows, device=device), grid

    def _flush(self) -> None:
        """Count what waits."""
        if not self._extremes or self.counts is None:
            return
        self.counts[0] += self._count(self._buffer[: self._waiting])
        self.lo.clamp_(max=min(self._extremes))
        self.hi.clamp_(min=max(self._extremes))
        if self._step > 1:
            self.counts[0] += self._count(torch.tensor(self._extremes, device=self.lo.device))
        self._waiting, self._extremes = 0, []

    def _add_blocks(self, x: Tensor) -> None:
        parts = blocks_of(x.float(), self.block)
        rows = parts.reshape(-1, parts.shape[-1])
        if self.counts is None:
            self._start(len(rows), parts.shape[:-1], x.device)
        assert self.counts is not None
        lo, hi = rows.aminmax(dim=1)
        self.lo, self.hi = torch.minimum(self.lo, lo), torch.maximum(self.hi, hi)
        self._grow(_exponent(lo.min().item(), hi.max().item()))
        index = ((rows / 2.0**self.exponent + 1) * (BINS // 2)).long().clamp(0, BINS - 1)
        ones = torch.ones((), dtype=torch.float64, device=x.device).expand_as(index)
        self.counts.scatter_add_(1, index, ones)

    def _grow(self, exponent: int) -> None:
        """Widen the range to ±2^exponent by merging bins about zero."""
        assert self.counts is not None
        steps = exponent - self.exponent
        if steps <= 0:
            return
        self._flush()
        self.exponent = exponent
        if not self.counts.any():
            return
        for _ in range(min(steps, BINS.bit_length())):
            merged = self.counts.view(len(self.counts), BINS // 2, 2).sum(-1)
            self.counts = torch.nn.functional.pad(merged, [BINS // 4, BINS // 4])

    def merge(self, other: Histogram) -> None:
        """Add the counts of another histogram."""
        self._flush()
        other._flush()
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
        self._flush()
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


def _coprime_step(size: int, sample: int) -> int:
    """About size / sample, and in step with no dimension of the tensor, so that the sample meets all channels."""
    step = max(1, size // sample)
    while math.gcd(step, size) > 1:
        step += 1
    return step


def _offset(lo: float, hi: float) -> int:
    """Where the sample of a tensor starts: elsewhere for each, and the same in whatever order tensors are seen."""
    return zlib.crc32(struct.pack("dd", lo, hi))


def _exponent(lo: float, hi: float) -> int:
    """The smallest k with |lo|, |hi| < 2^k."""
    return math.frexp(max(-lo, hi, 0.0))[1]
