"""Shared micro-exponents (MX6, MX9): two levels of scaling, the second of one bit for each pair of values.

Darvish Rouhani et al., 2023, "With Shared Microexponents, A Little Shifting Goes a Long Way" (arXiv 2302.08007). In
units of the block's finest step 2^(E − magnitude), E the exponent of its largest value, a pair in which both values
are below 2^magnitude keeps that step; any other pair goes in steps of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.errors import ConfigError
from graphq.numerics.formats import SharedExponents
from graphq.numerics.rounding import ROUND, Rounding


def round_pairs_(x: Tensor, fmt: SharedExponents, rounding: Rounding = "half_even") -> Tensor:
    """Round float32 values [..., block], in units of the finest step, in place. NaN and infinity stay."""
    if x.shape[-1] % 2:
        raise ConfigError(
            f"{fmt.name} needs pairs along the last axis, and a block has {x.shape[-1]} values",
            remedy="Use an even group size, in groups along the last axis.",
        )
    pairs = x.unflatten(-1, (-1, 2))
    coarse = (pairs.abs() >= 2**fmt.magnitude).any(-1, keepdim=True)
    step = torch.where(coarse, 2.0, 1.0)
    limit = step * (2**fmt.magnitude - 1)
    rounded = ROUND[rounding](pairs / step) * step
    rounded = torch.minimum(torch.maximum(rounded, -limit), limit)
    return x.copy_(torch.where(pairs.isfinite(), rounded, pairs).flatten(-2))
