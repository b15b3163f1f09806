"""Products of float32 matrices, by oneDNN on CPUs with AVX-512.

torch gives float32 products to MKL, which leaves half of the width of processors that are not Intel's unused. oneDNN
does not, and is as fast elsewhere. The machine alone decides, so that runs on one machine give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STRIPES = 6  # in which half a matrix is computed
LEAST = 64  # rows, columns and terms of a sum: smaller products do not pay for the way there


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a · b, [m, k] and [k, n] or batches of these."""
    if a.ndim == 3 and len(a) == len(b) == 1 and _by_onednn(a[0], b[0].T):
        return linear(a[0], b[0].T)[None]
    return linear(a, b.T) if a.ndim == 2 else a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, x: […, in], weight: [out, in]."""
    if not _by_onednn(x, weight):
        return torch.nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        product: Tensor = _Linear.apply(x, weight)
        return product if bias is None else product + bias
    return _onednn(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not (weight.is_contiguous() or weight.T.is_contiguous()):
        weight = weight.contiguous()  # else it computes element by element
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """oneDNN's product has no gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        first = linear(grad, weight.T) if ctx.needs_input_grad[0] else None
        rows = grad.flatten(0, -2), x.flatten(0, -2)
        return first, matmul(rows[0].T, rows[1]) if ctx.needs_input_grad[1] else None


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    same = all(t.device.type == "cpu" and t.dtype is torch.float32 for t in (x, weight))
    return same and min(x.numel() // max(1, x.shape[-1]), *weight.shape) >= LEAST


def add_moments(total: Tensor, rows: Tensor) -> None:
    """total [groups, in, in] += rowsᵀ·rows, but for blocks of it that lie under the diagonal. rows: [groups, n, in]."""
    step = -(-total.shape[1] // STRIPES)
    turned = rows[0].T
    one = len(rows) == 1 and _by_onednn(turned[:step], turned)
    if one:
        turned = turned.contiguous()
    for start in range(0, total.shape[1], step):
        part = slice(start, start + step)
        if one:
            total[0, part, start:] += linear(turned[part], turned[start:])
        else:
            total[:, part, start:].baddbmm_(rows[:, :, part].transpose(1, 2), rows[:, :, start:])


def mirrored(total: Tensor) -> Tensor:
    """What `add_moments` has summed, in place, with what lies under the diagonal."""
    step = -(-total.shape[1] // STRIPES)  # by stripes: a second matrix would not be small
    for start in range(0, total.shape[1], step):
        stop = start + step
        total[:, stop:, start:stop] = total[:, start:stop, stop:].mT
        block = total[:, start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).mT)
    return total
