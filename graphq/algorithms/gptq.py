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


@weight_algorithm("gptq")
def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    damping: float = 0.01,
    order: Literal["activation", "none"] = "activation",
    groups: Literal["static", "dynamic"] = "static",
    block: int = 128,
) -> Tensor:
    """damping: λ, relative to the mean of H's diagonal. order: columns whose inputs are largest come first, or as they
    stand. groups: scales come from the float weight ("static"), or from the weight as it is when its group is reached.
    block: columns whose errors are collected before the columns behind them are told."""
    if order not in ("activation", "none") or groups not in ("static", "dynamic"):
        raise ConfigError(f"order {order!r}, groups {groups!r}", where="gptq", remedy="See docs/gptq.md.")
    if groups == "dynamic" and order == "activation":
        raise ConfigError(
            "dynamic groups are those of neighbours", where="gptq", remedy="order: none, or groups: static."
        )
    dead = hessian.diagonal() == 0
    weight = weight.masked_fill(dead, 0.0)
    if order == "activation":
        places = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    else:
        places = torch.arange(len(hessian), device=weight.device)
    factor = inverse_factor(hessian[places][:, places], damping)
    result = _walk(weight[:, places], factor, grid, places, block, refit=groups == "dynamic")
    return torch.empty_like(result).index_copy_(1, places, result)


def _walk(w: Tensor, factor: Tensor, grid: Grid, places: Tensor, block: int, *, refit: bool) -> Tensor:
    """w [out, in], its columns in the order of `places` → their rounded values."""
    w, result = w.clone(), torch.empty_like(w)
    scales, zeros = grid.columns()
    where = places.tolist()
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        part, errors, inner = w[:, start:stop], torch.empty_like(w[:, start:stop]), factor[start:stop, start:stop]
        for i in range(stop - start):
            column, at = part[:, i], where[start + i]
            if refit and at % grid.width == 0:
                grid.refit(at, _current(w, errors, factor, start, i, grid.width))
                scales, zeros = grid.columns()
            rounded = grid.nearest(column, scales[:, at], zeros[:, at])
            error = (column - rounded) / inner[i, i]
            part[:, i + 1 :].addr_(error, inner[i, i + 1 :], alpha=-1)
            result[:, start + i], errors[:, i] = rounded, error
        w[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return result


def _current(w: Tensor, errors: Tensor, factor: Tensor, start: int, i: int, width: int) -> Tensor:
    """The next columns of w as they are: those behind the block have not heard of the errors in it."""
    first = start + i
    last, told = min(first + width, w.shape[1]), start + errors.shape[1]
    columns = w[:, first:last].clone()
    if last > told:
        columns[:, told - first :] -= errors[:, :i] @ factor[start:first, told:last]
    return columns


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U with H⁻¹ = Uᵀ·U, upper triangular, float32. Raises CalibrationError where H stays singular."""
    hessian = hessian.double()
    diagonal = hessian.diagonal().clone()
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean()
    for _ in range(RETRIES):
        damped = hessian.clone()
        damped.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return upper.float()
        damping = max(damping, 1e-4) * 10
    raise CalibrationError(
        "the inputs of this layer span too few directions", remedy="Give more calibration data, or more damping."
    )
