"""GPTAQ (Li et al., 2025): GPTQ that aims at the products of the float model, on the inputs that the rounded one gives.

    W·X - Ŵ·X̂ = (W - Ŵ)·X̂ + W·(X - X̂),     X: inputs of the float model, X̂: those of the rounded one

The first term is GPTQ's. What column i adds to the second is made good in the columns that are rounded after it, as
well as these can, which is known before any is rounded:

    W ← W + α·W·P,     P = triu((X - X̂)·X̂ᵀ·Uᵀ, 1)·U,     U as in GPTQ

(The paper takes column i as it is when its turn has come; errors of rounding are left out of this term here.)
"""

from __future__ import annotations

from torch import Tensor

from graphq.algorithms.gptq import in_order, inverse_factor, reordered, walk
from graphq.algorithms.grid import Grid
from graphq.algorithms.sequential import weight_algorithm
from graphq.errors import ConfigError
from graphq.numerics.products import matmul


@weight_algorithm("gptaq", asymmetric=True)
def gptaq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    cross: Tensor | None = None,
    alpha: float = 0.25,
    damping: float = 0.01,
    block: int = 32,
) -> Tensor:
    """alpha: the share of the second term that is made good, 0 (GPTQ) to 1. damping, block: as in gptq. The walk gives
    cross: (X - X̂)·X̂ᵀ [in, in], None for experts."""
    if not 0 <= alpha <= 1 or block < 1 or damping <= 0:
        raise ConfigError(f"alpha {alpha} is from 0 to 1, block {block}, damping {damping} positive", where="gptaq")
    one = hessian[None]
    places = in_order(one)
    factor = inverse_factor(one, places, damping)
    if cross is not None:
        push = matmul(matmul(reordered(cross[None], places)[0], factor[0].T).triu(1), factor[0])
        weight = weight.index_add(1, places[0], alpha * matmul(weight[:, places[0]], push))
    return walk(weight[None], one, factor, grid, places, block)[0]
