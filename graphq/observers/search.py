"""The range with the least loss on a histogram, by mean squared error or by Kullback-Leibler divergence.

Ends of the range are tried at `grid` fractions of the extremes: both together for symmetric specs, else one end after
the other until neither moves.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from graphq.config.spec import QuantSpec
from graphq.numerics.floating import round_to_grid_
from graphq.numerics.formats import Floating
from graphq.observers.base import OBSERVERS
from graphq.observers.histogram import SAMPLE, Histogram


class RangeSearch:
    """Tries ranges; subclasses score them."""

    def __init__(self, spec: QuantSpec, block: tuple[int, ...], grid: int = 80, smallest: float = 0.1) -> None:
        self.spec, self.grid, self.smallest = spec, grid, smallest
        self.histogram = Histogram(block, SAMPLE)

    def update(self, x: Tensor) -> None:
        self.histogram.add(x)

    def merge(self, other: RangeSearch) -> None:
        self.histogram.merge(other.histogram)

    @abstractmethod
    def loss(self, counts: Tensor, centers: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """Loss [candidates] of the ranges lo, hi [candidates] on one row of counts."""

    def range(self) -> tuple[Tensor, Tensor]:
        h = self.histogram
        ends = [self._search(row, lo, hi) for row, lo, hi in zip(h.filled(), h.lo.double(), h.hi.double(), strict=True)]
        return h.shaped(torch.stack([e[0] for e in ends])), h.shaped(torch.stack([e[1] for e in ends]))

    def _search(self, row: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        used = row > 0
        counts, centers = row[used], self.histogram.centers()[used]
        fractions = torch.linspace(1.0, self.smallest, self.grid, dtype=torch.float64, device=row.device)
        if self.spec.symmetric:
            limit = torch.maximum(-lo, hi)
            best = self._best(counts, centers, -limit * fractions, limit * fractions)
            return -limit * fractions[best], limit * fractions[best]
        low, high = lo, hi
        for _ in range(3):
            previous = (low, high)
            high = (hi * fractions)[self._best(counts, centers, low.expand(self.grid), hi * fractions)]
            low = (lo * fractions)[self._best(counts, centers, lo * fractions, high.expand(self.grid))]
            if (low, high) == previous:
                break
        return low, high

    def _best(self, counts: Tensor, centers: Tensor, lo: Tensor, hi: Tensor) -> int:
        if len(counts) == 0 or (bool(lo[0] == lo[-1]) and bool(hi[0] == hi[-1])):
            return 0
        return int(self.loss(counts, centers, lo, hi).argmin())

    def _codes(self, centers: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, values) [candidates, bins] of the bin centers under each range."""
        s, fmt = self.spec, self.spec.number_format
        scale, zero = s.choose(lo, hi)
        step, middle = scale.double()[:, None], zero.double()[:, None]
        if isinstance(fmt, Floating):
            codes = round_to_grid_((centers / step).float(), fmt).double()
            return codes, codes * step
        codes = (torch.round(centers / step) + middle).clamp(*fmt.limits(s.narrow_range))
        return codes, (codes - middle) * step


@OBSERVERS.register("mse")
class MeanSquaredError(RangeSearch):
    """The range with the least squared error, clipping and rounding together."""

    def loss(self, counts: Tensor, centers: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        _, values = self._codes(centers, lo, hi)
        return ((values - centers).square() * counts).sum(1)


@OBSERVERS.register("entropy")
class Entropy(RangeSearch):
    """The range that keeps the distribution: least KL(P ‖ Q), where P holds the clipped values in its last bins and
    Q spreads what each code holds evenly over the bins that the code stands for (TensorRT's calibration)."""

    def loss(self, counts: Tensor, centers: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        codes, _ = self._codes(centers, lo, hi)
        return torch.stack([self._divergence(counts, centers, c, a, b) for c, a, b in zip(codes, lo, hi, strict=True)])

    @staticmethod
    def _divergence(counts: Tensor, centers: Tensor, codes: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        inside = (centers >= lo) & (centers <= hi)
        if not bool(inside.any()):
            return torch.tensor(float("inf"), dtype=torch.float64, device=counts.device)
        p = counts[inside].clone()
        levels, index = codes[inside].unique(return_inverse=True)
        held = torch.zeros(len(levels), dtype=p.dtype, device=p.device).scatter_add_(0, index, p)
        width = torch.zeros_like(held).scatter_add_(0, index, torch.ones_like(p))
        q = (held / width)[index]
        p[0] += counts[centers < lo].sum()
        p[-1] += counts[centers > hi].sum()
        p, q = p / p.sum(), q / q.sum()
        return (p * (p / q).log()).sum()
