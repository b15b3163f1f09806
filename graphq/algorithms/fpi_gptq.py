"""GPTQ's columns all at once, as a fixed point: a few dense products in place of a loop over columns.

    W ← W₀ - ((W - nearest(W)) / diag U)·triu(U, 1),   U = upper Cholesky factor of H⁻¹

The weight that this leaves as it is, is the one that GPTQ reaches; after k steps the first k columns are as GPTQ has
them, and most of the others, since an error goes far only where inputs are strongly correlated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.algorithms.gptq import inverse_factor
from graphq.algorithms.grid import Grid
from graphq.algorithms.sequential import weight_algorithm
from graphq.errors import ConfigError
from graphq.numerics.products import matmul


@weight_algorithm("fpi_gptq")
def fpi_gptq(weight: Tensor, hessian: Tensor, grid: Grid, *, damping: float = 0.01, iterations: int = 50) -> Tensor:
    """damping: relative to the mean of H's diagonal. iterations: at most, it ends at the fixed point; of all steps the
    weight counts whose products are closest. weight: [out, in], hessian: [in, in]."""
    if iterations < 1 or damping <= 0:
        raise ConfigError(f"iterations {iterations} and damping {damping} are positive numbers", where="fpi_gptq")
    if not hessian.any():
        return grid.rounded(weight)  # its inputs are zero in all data
    places = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[None], places[None], damping)[0]
    diagonal, passed_on = factor.diagonal(), factor.triu(1)
    chosen = grid.rounded(weight)
    best, least = chosen, _lost(weight - chosen, hessian)
    rounded, current = chosen, weight
    for _ in range(min(iterations, weight.shape[1])):
        errors = matmul((current - rounded)[:, places] / diagonal, passed_on)
        current = torch.empty_like(weight).index_copy_(1, places, weight[:, places] - errors)
        before, rounded = rounded, grid.rounded(current)
        if torch.equal(before, rounded):
            break
        lost = _lost(weight - rounded, hessian)
        if lost < least:
            best, least = rounded, lost
    return best


def _lost(error: Tensor, hessian: Tensor) -> float:
    return float((matmul(error, hessian) * error).sum())
