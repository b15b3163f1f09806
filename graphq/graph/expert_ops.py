"""Linears of experts whose weights are one tensor.

    experts(x, weight, offsets)     row r of x times the weight of its expert

x: [rows, in], sorted by expert; offsets: [experts], where the rows of each expert end; weight: [experts, out, in].
"""

from __future__ import annotations

from typing import Any

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


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, offsets = ctx.saved_tensors
    of_x, of_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for expert, (start, stop) in enumerate(bounds(offsets)):
        of_x[start:stop] = grad[start:stop] @ weight[expert]
        of_weight[expert] = grad[start:stop].T @ x[start:stop]
    return of_x, of_weight, None


experts.register_autograd(_gradients, setup_context=_save)


def bounds(offsets: Tensor) -> list[tuple[int, int]]:
    """(first row, row behind the last) of every expert."""
    ends = [int(end) for end in offsets.tolist()]
    return list(zip([0, *ends], ends, strict=False))


EXPERTS = torch.ops.graphq.experts.default
