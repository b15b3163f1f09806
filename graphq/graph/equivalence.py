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
ULP = 4096  # units in the last place of the largest value: what reordered sums and folded factors may cost


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
    strange = ~(x.isfinite() & y.isfinite())
    if not torch.equal(x[strange], y[strange]) and not bool((x[strange].isnan() & y[strange].isnan()).all()):
        return "infinities or NaN differ"
    difference = (x - y)[~strange].abs().max().item() if not bool(strange.all()) else 0.0
    allowed = 0.0 if promise == "exact" else ULP * torch.finfo(a.dtype).eps * x[~strange].abs().max().item()
    return None if difference <= allowed else f"values differ by up to {difference:.3g}, {allowed:.3g} is allowed"
