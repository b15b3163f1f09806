"""A range that is known beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError
from graphq.observers.base import OBSERVERS


@OBSERVERS.register("fixed")
class Fixed:
    """lo to hi, whatever the data are: sensors with known limits, probabilities. Zero must lie inside."""

    def __init__(self, spec: QuantSpec, block: tuple[int, ...], lo: float, hi: float) -> None:
        where = "observer 'fixed'"
        if block:
            raise ConfigError("a fixed range is of a whole tensor", where=where, remedy="granularity: tensor.")
        if not lo <= 0.0 <= hi or lo == hi:
            raise ConfigError(f"{lo} to {hi} is no range around zero", where=where, remedy="lo <= 0 <= hi.")
        self.lo, self.hi = lo, hi
        self.device = torch.device("cpu")

    def update(self, x: Tensor) -> None:
        self.device = x.device

    def merge(self, other: Fixed) -> None:
        """There is nothing to merge, but the place where data were."""
        self.device = other.device

    def range(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.lo, device=self.device), torch.tensor(self.hi, device=self.device)
