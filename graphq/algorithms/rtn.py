"""Round to nearest, layer by layer: what a weight is rounded to anyway, here with QEP's correction before it."""

from __future__ import annotations

from torch import Tensor

from graphq.algorithms.grid import Grid
from graphq.algorithms.sequential import weight_algorithm


@weight_algorithm("rtn", judged=False)
def rtn(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """weight: [out, in]. It has no arguments of its own."""
    return grid.rounded(weight)
