"""The grid of shrunken ranges with the least error on the tensor itself, block by block: for weights."""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.config.spec import QuantSpec
from graphq.errors import CalibrationError
from graphq.numerics.affine import MASK_VALUE, blocks_of, fake_quantize
from graphq.observers.base import OBSERVERS
from graphq.observers.minmax import MovingAverage, batch_range


@OBSERVERS.register("mse_grid")
class MseGrid(MovingAverage):
    """Of the ranges (1 − i / grid) · extremes, i < shrink · grid, the one with the least Σ|error|^norm in each block
    (llm-compressor's and GPTQ's search); over several batches their moving average.

    patience: stop after so many steps that no block gained from. rate: see `moving_average`.
    """

    def __init__(
        self,
        spec: QuantSpec,
        block: tuple[int, ...],
        rate: float = 1.0,
        shrink: float = 0.2,
        grid: int = 100,
        norm: float = 2.4,
        patience: int = 5,
    ) -> None:
        super().__init__(spec, block, rate)
        self.spec, self.steps, self.grid, self.norm, self.patience = spec, int(shrink * grid), grid, norm, patience

    @torch.no_grad()
    def batch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Extremes as in `moving_average`, shrunken to the best."""
        lo, hi = batch_range(x, self.block)
        x = x.float().masked_fill(x <= MASK_VALUE, 0.0)
        best = torch.full_like(lo, torch.inf)
        share, idle = torch.ones_like(lo), 0
        for step in range(self.steps):
            p = 1 - step / self.grid
            loss = self._loss(x, lo * p, hi * p).reshape(lo.shape)
            better = loss < best
            best, share = torch.where(better, loss, best), torch.where(better, p, share)
            idle = 0 if bool(better.any()) else idle + 1
            if idle >= self.patience:
                break
        return lo * share, hi * share

    def _loss(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        s = self.spec
        scale, zero = s.choose(lo, hi)
        error = fake_quantize(x, scale, zero, self.block, s.number_format, narrow_range=s.narrow_range).sub_(x)
        error = error.square_() if self.norm == 2 else error.abs_().pow_(self.norm)
        return blocks_of(self._cost(error), self.block).sum(-1)

    def _cost(self, error: Tensor) -> Tensor:
        return error


@OBSERVERS.register("imatrix_mse")
class WeightedMseGrid(MseGrid):
    """`mse_grid` with each squared error of a weight times the mean square of the input it meets (importance matrix).

    That is what its products lose, as far as inputs are not correlated.
    """

    importance: Tensor | None = None  # goes with the weight by broadcasting; given before the weight is seen

    def __init__(
        self,
        spec: QuantSpec,
        block: tuple[int, ...],
        rate: float = 1.0,
        shrink: float = 0.4,
        grid: int = 50,
        norm: float = 2.0,
        patience: int = 5,
    ) -> None:
        super().__init__(spec, block, rate, shrink, grid, norm, patience)

    def _cost(self, error: Tensor) -> Tensor:
        if self.importance is None:
            raise CalibrationError(
                "the observer imatrix_mse is for weights of conv and linear layers",
                remedy="Choose another observer for activations.",
            )
        return error.mul_(self.importance)
