"""Kernels on packed weights of 2, 4 or 8 bits in blocks along the last axis, as ONNX Runtime computes them.

    matmul_nbits(x, packed, scale, zero_point, bias, k, bits, block_size, accuracy_level)     MatMulNBits
    gather_nbits(packed, ids, scale, zero_point, k, bits, block_size)                         GatherBlockQuantized

packed: [rows, blocks, block_size · bits / 8] bytes of unsigned codes; scale: float32 [rows, blocks]; zero_point: bytes
[rows, ⌈blocks · bits / 8⌉], or None for the middle code; bias: float32 [rows]. k: the length of a row without what
fills its last block. accuracy_level 4 rounds x to int8 too, in blocks of the same size with scale = largest magnitude /
127; 0 keeps it float.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.numerics.packing import unpack


def unpacked(
    packed: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """(codes less their zero point [rows, blocks, block_size], scale [rows, blocks, 1]), float32."""
    codes = unpack(packed, bits, block_size).float()
    if zero_point is None:
        return codes - float(1 << (bits - 1)), scale.unsqueeze(-1)
    return codes - unpack(zero_point, bits, scale.shape[1]).float().unsqueeze(-1), scale.unsqueeze(-1)


@torch.library.custom_op("graphq::matmul_nbits", mutates_args=())
def matmul_nbits(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    k: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    codes, scales = unpacked(packed, scale, zero_point, bits, block_size)
    weight = (codes * scales).flatten(1)[:, :k]
    if accuracy_level == 4:
        x = rounded_to_int8(x, block_size)
    return torch.nn.functional.linear(x, weight, bias)


@matmul_nbits.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    k: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def rounded_to_int8(x: Tensor, block_size: int) -> Tensor:
    """x [..., k] rounded to int8 in blocks along the last axis, each with its own symmetric scale."""
    k = x.shape[-1]
    blocks = torch.nn.functional.pad(x, [0, -k % block_size]).unflatten(-1, (-1, block_size))
    largest = blocks.abs().amax(-1, keepdim=True)
    # not 127 / largest, which torch computes as 127 · (1 / largest), with two roundings
    inverse = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)
    return (torch.round(blocks * inverse) * (largest / 127)).flatten(-2)[..., :k]


@torch.library.custom_op("graphq::gather_nbits", mutates_args=())
def gather_nbits(
    packed: Tensor, ids: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, bits: int, block_size: int
) -> Tensor:
    rows = ids.reshape(-1)
    zero_point = None if zero_point is None else zero_point[rows]
    codes, scales = unpacked(packed[rows], scale[rows], zero_point, bits, block_size)
    return (codes * scales).flatten(1)[:, :k].reshape(*ids.shape, k)


@gather_nbits.register_fake
def _(
    packed: Tensor, ids: Tensor, scale: Tensor, zero_point: Tensor | None, k: int, bits: int, block_size: int
) -> Tensor:
    return scale.new_empty(*ids.shape, k)


MATMUL_NBITS = torch.ops.graphq.matmul_nbits.default
GATHER_NBITS = torch.ops.graphq.gather_nbits.default
