"""GPTQ (Frantar et al., 2022): columns are rounded one after the other, and the error of each is made good in those
that are still to come, as far as the inputs of the calibration data are correlated.

    H = X·Xᵀ + λ·mean(diag H)·I,   U = upper Cholesky factor of H⁻¹
    column i:   q = nearest(w_i),   e = (w_i - q) / U_ii,   w_j -= e·U_ij for all j > i
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from graphq.algorithms.grid import Grid
from graphq.algorithms.sequential import weight_algorithm
from graphq.errors import CalibrationError, ConfigError
from graphq.numerics.products import matmul

RETRIES = 5  # with ten times the damping each
SMALL = 128  # rows of a triangle that is inverted as it is


@weight_algorithm("gptq", together=True, by_row=True)
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
    block: columns that hear of each other's errors one by one; further ones hear of many at once. weight: [groups, out,
    in], hessian: [groups, in, in]."""
    if block < 1 or damping <= 0:
        raise ConfigError(f"block {block} and damping {damping} are positive numbers", where="gptq")
    if order not in ("activation", "none") or groups not in ("static", "dynamic"):
        raise ConfigError(f"order {order!r}, groups {groups!r}", where="gptq", remedy="See docs/algorithms.md.")
    if groups == "dynamic" and order == "activation":
        raise ConfigError(
            "dynamic groups are those of neighbours", where="gptq", remedy="order: none, or groups: static."
        )
    places = in_order(hessian, activation=order == "activation")
    factor = inverse_factor(hessian, places, damping)
    if groups == "dynamic" and grid.block:
        block = -(-block // grid.width) * grid.width  # whole groups
    return walk(weight, hessian, factor, grid, places, block, refit=groups == "dynamic")


def in_order(hessian: Tensor, *, activation: bool = True) -> Tensor:
    """The places of the columns [groups, in], those with the largest inputs first or as they stand."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    if activation:
        return torch.argsort(diagonal, dim=1, descending=True, stable=True)
    return torch.arange(diagonal.shape[1], device=hessian.device).expand_as(diagonal)


def reordered(matrix: Tensor, places: Tensor) -> Tensor:
    """[groups, in, in], rows and columns in this order."""
    group = torch.arange(len(matrix), device=matrix.device)[:, None, None]
    return matrix[group, places[:, :, None], places[:, None, :]]


def walk(
    weight: Tensor, hessian: Tensor, factor: Tensor, grid: Grid, places: Tensor, block: int, *, refit: bool = False
) -> Tensor:
    """weight [groups, out, in], the factor of its columns in the order of `places` [groups, in] → its rounded values.
    Groups whose hessian is zero are rounded to the nearest: their inputs are zero in all data."""
    index = places[:, None].expand_as(weight)
    w = weight.gather(2, index).permute(2, 0, 1).contiguous()  # columns come first, and are errors once rounded
    result, diagonal = torch.empty_like(w), factor.diagonal(dim1=1, dim2=2).T[..., None]
    nearest = grid.nearest(places)

    def columns(start: int, stop: int) -> None:
        nonlocal nearest
        for i in range(start, stop):
            if refit and grid.block and i % grid.width == 0:
                grid.refit(i, w[i : i + grid.width].flatten(1).T)
                nearest = grid.nearest(places)
            w[i].sub_(nearest(w[i].view(-1), i, result[i].view(-1)).view_as(w[i])).div_(diagonal[i])
            w[i + 1 : stop].addcmul_(factor[:, i, i + 1 : stop].T[..., None], w[i], value=-1)

    for start, middle, stop in _halves(0, len(w), block):
        if middle == stop:
            columns(start, stop)
        else:
            heard = factor[:, start:middle, middle:stop].transpose(1, 2)
            w[middle:stop] -= matmul(heard, w[start:middle].transpose(0, 1)).transpose(0, 1)
    found = torch.empty_like(weight).scatter_(2, index, result.permute(1, 2, 0))
    dead = ~hessian.flatten(1).any(1)
    if dead.any():
        found[dead] = grid.rounded(weight.flatten(0, 1)).view_as(weight)[dead]
    return found


def _halves(start: int, stop: int, block: int) -> Iterator[tuple[int, int, int]]:
    """(start, middle, stop): half, what its errors make of the other half, and that. middle is stop where no half is
    left, but columns that are walked one by one."""
    if stop - start <= block:
        yield start, stop, stop
        return
    middle = start + -(-(stop - start) // (2 * block)) * block
    yield from _halves(start, middle, block)
    yield start, middle, stop
    yield from _halves(middle, stop, block)


def inverse_factor(hessian: Tensor, places: Tensor, damping: float) -> Tensor:
    """U with H⁻¹ = Uᵀ·U, upper triangular, float32 [groups, in, in], of H with its columns in the order of `places`
    [groups, in]. Raises CalibrationError where H stays singular.

    With that order turned round, H = L·Lᵀ; turned back, L is upper triangular and U its inverse.
    """
    places = places.flip(1)
    diagonal = hessian.diagonal(dim1=1, dim2=2).gather(1, places).double()
    seen = diagonal != 0
    mean = diagonal.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
    mean = mean.where(seen.any(1, keepdim=True), torch.ones_like(mean))
    diagonal = diagonal.where(seen, mean)  # of inputs that are always zero: any rounding will do
    share = torch.full_like(mean, damping)
    for _ in range(RETRIES):
        lower = reordered(hessian, places).double().mT  # symmetric; LAPACK works in place on columns
        lower.diagonal(dim1=1, dim2=2).copy_(diagonal + share * mean)
        failed = torch.zeros(len(lower), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))  # of a wide layer each copy counts
        if not failed.any():
            lower = lower.float()
            return _inverse(lower).flip(1, 2)
        del lower  # before the next is made
        share = torch.where(failed[:, None] != 0, share.clamp(min=1e-4) * 10, share)
    raise CalibrationError(
        "the inputs of this layer span too few directions", remedy="Give more calibration data, or more damping."
    )


def _inverse(lower: Tensor) -> Tensor:
    """Of lower triangular matrices: by halves, in a third of the operations of a general solution."""
    size = lower.shape[1]
    if size <= SMALL:
        one = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False)
    middle, result = size // 2, torch.zeros_like(lower)
    first, last = _inverse(lower[:, :middle, :middle]), _inverse(lower[:, middle:, middle:])
    result[:, :middle, :middle], result[:, middle:, middle:] = first, last
    result[:, middle:, :middle] = matmul(last, matmul(lower[:, middle:, :middle], first)).neg_()
    return result
