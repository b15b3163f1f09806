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
    if order == "activation":
        places = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    else:
        places = torch.arange(len(hessian), device=weight.device)
    factor = inverse_factor(hessian[places][:, places], damping)
    result = _walk(weight[:, places], factor, grid, places, block, refit=groups == "dynamic")
    return torch.empty_like(result).index_copy_(1, places, result)


def _walk(w: Tensor, factor: Tensor, grid: Grid, places: Tensor, block: int, *, refit: bool) -> Tensor:
    """w [out, in], its columns in the order of `places` → their rounded values. Columns are rows here: contiguous."""
    w = w.T.contiguous()
    result = torch.empty_like(w)
    nearest, where = grid.nearest(), places.tolist()
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        part, errors, inner = w[start:stop], torch.empty_like(w[start:stop]), factor[start:stop, start:stop]
        diagonal = inner.diagonal().tolist()
        for i in range(stop - start):
            at = where[start + i]
            if refit and grid.block and at % grid.width == 0:
                grid.refit(at, _current(w, errors, factor, start, i, grid.width).T)
                nearest = grid.nearest()
            rounded = nearest(part[i], at, result[start + i])
            torch.sub(part[i], rounded, out=errors[i]).div_(diagonal[i])
            part[i + 1 :].addr_(inner[i, i + 1 :], errors[i], alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return result.T


def _current(w: Tensor, errors: Tensor, factor: Tensor, start: int, i: int, width: int) -> Tensor:
    """The next rows of w as they are: those behind the block have not heard of the errors in it."""
    first = start + i
    last, told = min(first + width, len(w)), start + len(errors)
    rows = w[first:last].clone()
    if last > told:
        rows[told - first :] -= factor[start:first, told:last].T @ errors[:i]
    return rows


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U with H⁻¹ = Uᵀ·U, upper triangular, float32. Raises CalibrationError where H stays singular.

    With the order of columns turned round, H = L·Lᵀ; turned back, L is upper triangular and U its inverse.
    """
    hessian = hessian.double()
    diagonal = hessian.diagonal().clone()
    mean = diagonal[diagonal != 0].mean()
    diagonal[diagonal == 0] = mean  # of inputs that are always zero: any rounding will do
    for _ in range(RETRIES):
        damped = hessian.clone()
        damped.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            one = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            return torch.linalg.solve_triangular(lower, one, upper=False).flip(0, 1).float()
        damping = max(damping, 1e-4) * 10
    raise CalibrationError(
        "the inputs of this layer span too few directions", remedy="Give more calibration data, or more damping."
    )
