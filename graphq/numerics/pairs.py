"""Pairs of int8 weights that can drive a u8·s8 kernel of x86 without VNNI out of its int16 sums.

The kernel multiplies neighbours along K, u8·s8 + u8·s8, into a saturating int16. With activations up to 255, codes a
and b of a pair are safe for every input when max(a, 0) + max(b, 0) ≤ 128 and max(-a, 0) + max(-b, 0) ≤ 128; with
activations up to p and q, when p/255 · max(a, 0) + q/255 · max(b, 0) ≤ 128.498, and so for the negative ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

PAIR_LIMIT = (2**15 - 1) / 255  # of whole codes 128: 255 · 128 fits into int16, 255 · 129 does not


def along_k(weight: Tensor) -> Tensor:
    """Weight [out, in, …] → [out, K] in the order in which the kernel walks K: spatial positions, then channels."""
    return weight.movedim(1, -1).reshape(len(weight), -1)


def from_k(rows: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `along_k`."""
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def pairs_of(rows: Tensor) -> Tensor:
    """[out, K] → [out, ⌈K / 2⌉, 2], filled up with a zero."""
    return torch.nn.functional.pad(rows, [0, rows.shape[1] % 2]).unflatten(1, (-1, 2))


def lost_to_int16(x: Tensor, rows: Tensor) -> Tensor:
    """What x · rowsᵀ loses where the int16 sums of pairs saturate [n, out], float64.

    x: unsigned codes [n, K], rows: signed codes [out, K], both as floats, without their zero points taken off.
    """
    loss = torch.zeros(len(x), len(rows), dtype=torch.float64, device=x.device)
    unsafe = heaviest_side(rows) > PAIR_LIMIT
    inputs, pairs = pairs_of(x), pairs_of(rows)
    for p in unsafe.any(0).nonzero().flatten().tolist():
        out = unsafe[:, p].nonzero().flatten()
        sums = inputs[:, p] @ pairs[out, p].T
        loss[:, out] += (sums.clamp(-(2**15), 2**15 - 1) - sums).double()
    return loss


def heaviest_side(rows: Tensor, reach: Tensor | None = None) -> Tensor:
    """Of every pair the sum of its parts of one sign, the larger one [out, ⌈K / 2⌉]; safe up to PAIR_LIMIT.

    reach: of the inputs [K] or [out, K], the largest code of each as a share of 255; None: 1.
    """
    pairs = pairs_of(rows if reach is None else rows * reach)
    return torch.maximum(pairs.clamp(min=0).sum(-1), (-pairs).clamp(min=0).sum(-1))
