"""The graphq:: operators and their reference semantics.

    quantize(x, scale, zero_point, block, format)          float tensor → codes
    dequantize(codes, scale, zero_point, block, format)    codes → float32 tensor

They are the only two quantization ops between convert and lower. `block` is the block shape of
`graphq.numerics.affine`, `format` a name of the format table; a trailing "!" on it stands for the narrow range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphq.numerics import affine
from graphq.numerics.formats import Format, get_format


def parse_format(text: str) -> tuple[Format, bool]:
    """("int8!") → (the int8 row, narrow range)."""
    return get_format(text.removesuffix("!")), text.endswith("!")


@torch.library.custom_op("graphq::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], format: str) -> Tensor:
    fmt, narrow = parse_format(format)
    return affine.quantize(x, scale, zero_point, block, fmt, narrow_range=narrow)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], format: str) -> Tensor:
    return torch.empty_like(x, dtype=parse_format(format)[0].storage)


@torch.library.custom_op("graphq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], format: str) -> Tensor:
    return affine.dequantize(codes, scale, zero_point, block, parse_format(format)[0])


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], format: str) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


QUANTIZE = torch.ops.graphq.quantize.default
DEQUANTIZE = torch.ops.graphq.dequantize.default
