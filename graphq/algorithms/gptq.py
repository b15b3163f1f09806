"""GPTQ (Frantar et al., 2022): columns are rounded one after the other, and the error of each is made good in those
that are still to come, as far as the inputs of the calibration data are correlated.

    H = X·Xᵀ + λ·mean(diag H)·I,   U = upper Cholesky factor of H⁻¹
    column i:   q = nearest(w_i),   e = (w_i - q) / U_ii,   w_j -= e·U_ij for all j > i
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from graphq.algorithms.grid import Grid
from graphq.algorithms.sequential import weight_algorithm
from graphq.errors import CalibrationError, ConfigError

RETRIES = 5  # with ten times the damping each
SMALL = 128  # rows of a triangle that is inverted as it is


@weight_algorithm("gptq")
def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    order: Literal["activation", "none"] = "activation",
    groups: Literal["static", "dynamic"] = "static",
    block: int = 32,
) -> Tensor:
    """damping: λ, relative to the mean of H's diagonal. order: columns whose inputs are largest come first, or as they
    stand. groups: scales come from the float weight ("static"), or from the weight as it is when its group is reached.
    block: columns that hear of each other's errors one by one; further ones hear of many at once."""
    if block < 1 or damping <= 0:
        raise ConfigError(f"block {block} and damping {damping} are positive numbers", where="gptq")
    if order not in ("activation", "none") or groups not in ("static", "dynamic"):
        raise ConfigError(f"order {order!r}, groups {groups!r}", where="gptq", remedy="See docs/algorithms.md.")
    if groups == "dynamic" and order == "activation":
        raise ConfigError(
            "dynamic groups are those of neighbours", where="gptq", remedy="order: none, or groups: static."
        )
    if not hessian.any():
        return grid.rounded(weight)  # its inputs are zero in all data
    places, back = in_order(hessian, activation=order == "activation")
    factor = inverse_factor(hessian[places[:, None], places], damping)
    if groups == "dynamic" and grid.block:
        block = -(-block // grid.width) * grid.width  # whole groups
    return walk(weight[:, places], factor, grid, places.tolist(), block, refit=groups == "dynamic")[:, back]


def in_order(hessian: Tensor, *, activation: bool = True) -> tuple[Tensor, Tensor]:
    """(columns, those with the largest inputs first or as they stand; where each of them is then)."""
    if not activation:
        places = torch.arange(len(hessian), device=hessian.device)
        return places, places
    places = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    return places, torch.argsort(places)


def walk(weight: Tensor, factor: Tensor, grid: Grid, places: list[int], block: int, *, refit: bool = False) -> Tensor:
    """weight [out, in], its columns in the order of `places` → their rounded values."""
    w = weight.T.contiguous()  # columns are rows here, and errors once they have been rounded
    result, diagonal = torch.empty_like(w), factor.diagonal().tolist()
    nearest = grid.nearest()

    def columns(start: int, stop: int) -> None:
        nonlocal nearest
        for i in range(start, stop):
            if refit and grid.block and i % grid.width == 0:
                grid.refit(i, w[i : i + grid.width].T)
                nearest = grid.nearest()
            w[i].sub_(nearest(w[i], places[i], result[i])).div_(diagonal[i])
            w[i + 1 : stop].addr_(factor[i, i + 1 : stop], w[i], alpha=-1)

    def halves(start: int, stop: int) -> None:
        """Half, what its errors make of the other half, and that."""
        if stop - start <= block:
            return columns(start, stop)
        middle = start + -(-(stop - start) // (2 * block)) * block
        halves(start, middle)
        w[middle:stop].addmm_(factor[start:middle, middle:stop].T, w[start:middle], alpha=-1)
        halves(middle, stop)

    halves(0, len(w))
    return result.T


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U with H⁻¹ = Uᵀ·U, upper triangular, float32. Raises CalibrationError where H stays singular.

    With the order of columns turned round, H = L·Lᵀ; turned back, L is upper triangular and U its inverse.
    """
    turned = hessian.flip(0, 1).double()
    diagonal = turned.diagonal().clone()
    mean = diagonal[diagonal != 0].mean()
    diagonal[diagonal == 0] = mean  # of inputs that are always zero: any rounding will do
    for _ in range(RETRIES):
        turned.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(turned)
        if not failed:
            return _inverse(lower.float()).flip(0, 1)
        damping = max(damping, 1e-4) * 10
    raise CalibrationError(
        "the inputs of this layer span too few directions", remedy="Give more calibration data, or more damping."
    )


def _inverse(lower: Tensor) -> Tensor:
    """Of a lower triangular matrix: by halves, in a third of the operations of a general solution."""
    if len(lower) <= SMALL:
        one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, one, upper=False)
    middle, result = len(lower) // 2, torch.zeros_like(lower)
    first, last = _inverse(lower[:middle, :middle]), _inverse(lower[middle:, middle:])
    result[:middle, :middle], result[middle:, middle:] = first, last
    torch.mm(last, lower[middle:, :middle] @ first, out=result[middle:, :middle]).neg_()
    return result
