"""What a rewrite promises about the result, and whether it keeps it.

exact     every element is equal
ulp       equal up to the order of float operations
one_lsb   codes differ by one at most, floats as in ulp
lossy     shape and dtype stay; values may change (quantization itself)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Equivalence = Literal["exact", "ulp", "one_lsb", "lossy"]
ORDER: tuple[Equivalence, ...] = ("exact", "ulp", "one_lsb", "lossy")
# what reordered sums and folded factors may cost, as a share of the largest value: a few thousand units in the last
# place of float32, a few of the short formats, in which folded weights are rounded anew
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
MASK = 1e30  # masks and infinities must be equal, and say nothing about the size of the other values


def weakest(promises: Iterable[Equivalence]) -> Equivalence:
    """What remains promised when several rewrites are applied."""
    return max(promises, key=ORDER.index, default="exact")


def broken(promise: Equivalence, before: Any, after: Any) -> str | None:
    """Why two results (tensors, in any nesting) are not equivalent, or None."""
    ours, theirs = pytree.tree_leaves(before), pytree.tree_leaves(after)
    if len(ours) != len(theirs):
        return f"{len(ours)} results became {len(theirs)}"
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        reason = _apart(promise, a, b)
        if reason is not None:
            return f"result {number}: {reason}" if len(ours) > 1 else reason
    return None


def _apart(promise: Equivalence, a: Any, b: Any) -> str | None:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return None if type(a) is type(b) and a == b else f"{a!r} became {b!r}"
    if a.dtype != b.dtype:
        return f"{a.dtype} became {b.dtype}"
    if a.shape != b.shape:
        return f"the shape {list(a.shape)} became {list(b.shape)}"
    if promise == "lossy" or a.numel() == 0 or torch.equal(a, b):
        return None
    if not a.is_floating_point():
        steps = int((a.long() - b.long()).abs().max())
        return None if promise == "one_lsb" and steps <= 1 else f"values differ by up to {steps}"
    x, y = a.double(), b.double()
    usual = (x.abs() < MASK) & (y.abs() < MASK)
    if not torch.equal(x.isnan(), y.isnan()) or not torch.equal(x[~usual & ~x.isnan()], y[~usual & ~x.isnan()]):
        return "infinities, masks or NaN differ"
    if not bool(usual.any()):
        return None
    difference = (x - y)[usual].abs().max().item()
    allowed = 0.0 if promise == "exact" else TOLERANCE[a.dtype] * x[usual].abs().max().item()
    return None if difference <= allowed else f"values differ by up to {difference:.3g}, {allowed:.3g} is allowed"
