"""How a value between two codes is rounded, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Rounding = Literal["half_even", "half_away", "floor", "stochastic"]


def _half_away(x: Tensor) -> Tensor:
    # not floor(|x| + 0.5), which rounds the float below one half up
    whole = torch.trunc(x)
    return x.copy_(whole + torch.where((x - whole).abs() >= 0.5, torch.sign(x), 0.0))


def _stochastic(x: Tensor) -> Tensor:
    """Up with the probability of the distance from below; draws from torch's generator."""
    return x.add_(torch.rand_like(x)).floor_()


ROUND: dict[str, Callable[[Tensor], Tensor]] = {
    "half_even": Tensor.round_,
    "half_away": _half_away,
    "floor": Tensor.floor_,
    "stochastic": _stochastic,
}
assert set(ROUND) == set(get_args(Rounding))
