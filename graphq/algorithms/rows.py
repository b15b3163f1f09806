"""Weights as matrices [out, K], and what a row of them is multiplied with.

linear            [out, in]                  as it is
experts           [experts, out, in]         one below the other
conv              [out, in / groups, …]      by kernel positions, then channels; inputs are patches
conv_transpose    [in, out, …]               the convolution that it is: the kernel turned, zeros between inputs
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphq.graph.integer_ops import columns
from graphq.numerics.pairs import along_k, from_k


def matrix_of(weight: Tensor, family: str) -> Tensor:
    """[out, K] of a weight in its own shape."""
    if family == "conv":
        return along_k(weight)
    return along_k(_turned(weight)) if family == "conv_transpose" else weight.flatten(0, -2)


def weight_of(matrix: Tensor, shape: Sequence[int], family: str) -> Tensor:
    """The inverse of `matrix_of`."""
    if family == "conv":
        return from_k(matrix, torch.Size(shape))
    if family == "conv_transpose":
        return _turned(from_k(matrix, torch.Size([shape[1], shape[0], *shape[2:]]))).contiguous()
    return matrix.reshape(tuple(shape))


def _turned(weight: Tensor) -> Tensor:
    """[in, out, …] ↔ [out, in, …], every spatial axis backwards."""
    return weight.transpose(0, 1).flip(list(range(2, weight.ndim)))


def patches(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """x [n, in, …] or [in, …] → [rows, kernel positions …, in]: what a convolution multiplies."""
    batched = x if x.ndim == weight.ndim else x[None]
    return columns(batched, weight, stride, padding, dilation).flatten(0, weight.ndim - 2)


def spread(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
           more: Sequence[int]) -> Tensor:  # fmt: skip
    """The same of a transposed convolution. more: its output padding."""
    batched = x if x.ndim == weight.ndim else x[None]
    sizes = [(size - 1) * step + 1 for size, step in zip(batched.shape[2:], stride, strict=True)]
    wide = batched.new_zeros(*batched.shape[:2], *(size + m for size, m in zip(sizes, more, strict=True)))
    places = [slice(0, size, step) for size, step in zip(sizes, stride, strict=True)]
    wide[(slice(None), slice(None), *places)] = batched
    around = [gap * (k - 1) - p for gap, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    return patches(wide, weight, [1] * len(around), around, dilation)
