"""Blocks whose scales are found at run time, and MXFP8 weights, as TensorRT's own ops write them.

    dynamic_blocks(x, overall, tensor_scale, block, format, kind)    quantized and dequantized again
    mxfp8_weight(codes, exponents, block)                            dequantized

overall: float32 [], the largest magnitude that calibration saw, and tensor_scale the scale of the block scales that
follows from it, for kinds of two levels (NVFP4). block, format, kind: see `graphq.graph.ops`. codes: fp8 e4m3;
exponents: E8M0, uint8, 127 for 2⁰, one for each block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphq.graph.ops import choose_qparams, dequantize, quantize


@torch.library.custom_op("graphq::dynamic_blocks", mutates_args=())
def dynamic_blocks(
    x: Tensor, overall: Tensor | None, tensor_scale: Tensor | None, block: Sequence[int], format: str, kind: str
) -> Tensor:
    scale, zero = choose_qparams(x, block, format, kind, overall)
    codes: Tensor = quantize(x, scale, zero, block, format)
    result: Tensor = dequantize(codes, scale, zero, block, format)
    return result


@torch.library.custom_op("graphq::mxfp8_weight", mutates_args=())
def mxfp8_weight(codes: Tensor, exponents: Tensor, block: Sequence[int]) -> Tensor:
    scale = torch.exp2(exponents.float() - 127)
    result: Tensor = dequantize(codes, scale, torch.zeros_like(scale, dtype=torch.int32), block, "fp8_e4m3")
    return result


@dynamic_blocks.register_fake
def _(
    x: Tensor, overall: Tensor | None, tensor_scale: Tensor | None, block: Sequence[int], format: str, kind: str
) -> Tensor:
    return torch.empty_like(x)


@mxfp8_weight.register_fake
def _(codes: Tensor, exponents: Tensor, block: Sequence[int]) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


DYNAMIC_BLOCKS = torch.ops.graphq.dynamic_blocks.default
MXFP8_WEIGHT = torch.ops.graphq.mxfp8_weight.default
