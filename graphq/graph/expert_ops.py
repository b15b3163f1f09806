"""Linears of experts whose weights are one tensor.

    experts(x, weight, offsets)     row r of x times the weight of its expert

x: [rows, in], sorted by expert; offsets: [experts], where the rows of each expert end; weight: [experts, out, in].
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("graphq::experts", mutates_args=())
def experts(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    result = x.new_zeros(len(x), weight.shape[1])
    for expert, (start, stop) in enumerate(bounds(offsets)):
        if stop > start:
            torch.mm(x[start:stop], weight[expert].T, out=result[start:stop])
    return result


@experts.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def bounds(offsets: Tensor) -> list[tuple[int, int]]:
    """(first row, row behind the last) of every expert."""
    ends = [int(end) for end in offsets.tolist()]
    return list(zip([0, *ends], ends, strict=False))


EXPERTS = torch.ops.graphq.experts.default
