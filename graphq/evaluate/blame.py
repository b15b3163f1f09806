"""Why a kernel's codes are not the simulated ones: rounding, saturation, an overflow of the bias, or another kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphq.graph.integer_ops import QCONV, QGEMM

WEIGHT, BIAS = 3, 6  # positions among the arguments of both ops


def cause(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], given: Tensor, apart: Tensor) -> str:
    """In words. args, kwargs: of the integer op, on the runtime's codes; given: what the runtime makes of them; apart:
    how far the simulated codes are from that."""
    if node.target in (QCONV, QGEMM):
        saturating = bool(kwargs.get("saturating", False))
        other: Tensor = node.target(*args, saturating=not saturating)  # type: ignore[operator]
        if torch.equal(other.int(), given.int()):
            return "int16 saturation" if not saturating else "this CPU does not saturate"
        if args[BIAS] is not None and _overflows(args[WEIGHT], args[BIAS]):
            return "bias overflow"
    return "rounding" if int(apart.max()) <= 1 else "another kernel, or other operands"


def _overflows(weight: Tensor, bias: Tensor) -> bool:
    """Can bias and products [out, …] together leave int32?"""
    sums = 255 * weight.double().abs().flatten(1).sum(1)
    return bool((bias.double().abs() + sums > 2**31 - 1).any())
