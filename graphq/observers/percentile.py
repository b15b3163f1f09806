"""The range that holds a given share of the values."""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError
from graphq.observers.base import OBSERVERS
from graphq.observers.histogram import Histogram


@OBSERVERS.register("percentile")
class Percentile:
    """`percentile` % of the values lie inside: of |x| for symmetric specs; otherwise half of the rest on each side."""

    def __init__(self, spec: QuantSpec, block: tuple[int, ...], percentile: float = 99.999) -> None:
        if not 50 < percentile <= 100:
            raise ConfigError(f"percentile {percentile} is not between 50 and 100", where="observer 'percentile'")
        self.symmetric, self.share = spec.symmetric, percentile / 100
        self.histogram = Histogram(block)

    def update(self, x: Tensor) -> None:
        self.histogram.add(x)

    def merge(self, other: Percentile) -> None:
        self.histogram.merge(other.histogram)

    def range(self) -> tuple[Tensor, Tensor]:
        h = self.histogram
        counts = h.filled()
        if self.symmetric:
            half = counts.shape[1] // 2
            hi = _quantile(counts[:, half:] + counts[:, :half].flip(1), self.share, h.centers()[half:])
            lo = -hi
        else:
            tail = (1 - self.share) / 2
            hi = _quantile(counts, 1 - tail, h.centers())
            lo = -_quantile(counts.flip(1), 1 - tail, -h.centers().flip(0))
        lo, hi = torch.maximum(lo, h.lo.double()).clamp(max=0), torch.minimum(hi, h.hi.double()).clamp(min=0)
        return h.shaped(lo), h.shaped(hi)


def _quantile(counts: Tensor, share: float, centers: Tensor) -> Tensor:
    """Upper edge of the first bin at which the running count reaches the share, per row."""
    running = counts.cumsum(1)
    first = (running < share * running[:, -1:]).sum(1).clamp(max=counts.shape[1] - 1)
    return centers[first] + (centers[1] - centers[0]) / 2
