"""Codes of 2, 4 or 8 bits in bytes, the first code in the lowest bits (ONNX Runtime's MatMulNBits)."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [..., n] → bytes [..., ⌈n · bits / 8⌉], uint8; what is missing in the last byte is zero."""
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes.to(torch.uint8), [0, -codes.shape[-1] % per_byte])
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=codes.device) * bits
    return (codes.unflatten(-1, (-1, per_byte)) << shifts).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Bytes [..., m] → the first `count` codes [..., count], uint8."""
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=packed.device) * bits
    codes = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)[..., :count]
