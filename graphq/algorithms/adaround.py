"""AdaRound (Nagel et al., 2020): which way each weight is rounded is learned, on what its products lose.

    Ŵ = s·clamp(⌊W/s⌋ + h(V)),   h(V) = clip(1.2·sigmoid(V) - 0.1, 0, 1)
    minimize ‖(W - Ŵ)·X‖² / ‖(W - nearest)·X‖² + λ·mean(1 - |2·h(V) - 1|^β)

With H = X·Xᵀ the first term is a trace, so that no samples are kept. β falls from 20 to 2, which at last drives every h
to 0 or 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphq.algorithms.grid import Grid
from graphq.algorithms.sequential import weight_algorithm
from graphq.errors import ConfigError
from graphq.numerics.formats import Integer
from graphq.numerics.products import matmul

STRETCH, EDGE = 1.2, 0.1  # of the sigmoid: it reaches 0 and 1
SHARPEST, WIDEST, WARM = 2.0, 20.0, 0.2  # β, and the share of the steps before the second term counts


@weight_algorithm("adaround", together=True)
def adaround(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    iterations: int = 500,
    rate: float = 0.03,
    regularization: float = 10.0,
) -> Tensor:
    """iterations: of Adam, rate: its learning rate, regularization: λ. Rows whose products end no closer than those of
    the nearest values keep these. For integers. weight: [groups, out, in], hessian: [groups, in, in]."""
    if iterations < 1 or rate <= 0 or regularization <= 0:
        raise ConfigError(
            f"iterations {iterations}, rate {rate} and regularization {regularization} are positive", where="adaround"
        )
    if not isinstance(grid.spec.number_format, Integer):
        what = f"{grid.spec.format} has no next code up and down"
        raise ConfigError(what, where="adaround", remedy="algorithms: gptq.")
    nearest = grid.rounded(weight.flatten(0, 1)).reshape(weight.shape)
    before = _lost(weight - nearest, hessian)
    if not before.any():
        return nearest
    with torch.enable_grad():
        learned = _learn(weight, hessian / before.sum(), grid, iterations, rate, regularization)
    better = _lost(weight - learned, hessian) < before
    return torch.where(better[..., None], learned, nearest)


def _learn(weight: Tensor, hessian: Tensor, grid: Grid, iterations: int, rate: float, strength: float) -> Tensor:
    scale, zero = (t.expand(grid.shape).reshape(weight.shape) for t in grid.columns())
    low, high = grid.spec.number_format.limits(grid.spec.narrow_range)
    ratio = weight / scale
    floor, lowest, highest = ratio.floor(), low - zero, high - zero
    share = ((ratio - floor + EDGE) / STRETCH).clamp(1e-4, 1 - 1e-4)
    v = torch.logit(share).requires_grad_()
    optimizer = torch.optim.Adam([v], rate)
    for step in range(iterations):
        up = (STRETCH * v.sigmoid() - EDGE).clamp(0, 1)
        error = weight - (floor + up).clamp(lowest, highest) * scale
        loss = ((error @ hessian) * error).sum()
        done = (step / iterations - WARM) / (1 - WARM)
        if done > 0:
            beta = SHARPEST + (WIDEST - SHARPEST) * (1 + math.cos(done * math.pi)) / 2
            loss = loss + strength * (1 - (2 * up - 1).abs() ** beta).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ((floor + (v.detach() > 0)).clamp(lowest, highest) * scale).detach()


def _lost(error: Tensor, hessian: Tensor) -> Tensor:
    """By row [groups, out]."""
    return (matmul(error, hessian) * error).sum(-1)
