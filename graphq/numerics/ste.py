"""Fake-quantization with gradients, for quantization-aware training.

Straight-through: x gets the gradient of the result, everywhere or (clip) only where the code was not clamped.

LSQ (Esser et al., 2020, arXiv 1902.08153): with v = x / s, the gradient of the scale is the sum over its block of
Q(v) − v where v is inside the range and of the bound where it is outside, times the gradient of the result and times
1 / sqrt(values of the block · largest code). The offset of LSQ+ (Bhalgat et al., 2020, arXiv 2004.09576) is an integer
zero point here, as runtimes have them: it is rounded, and its gradient is −s outside the range, 0 inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphq.numerics.affine import blocks_of, expand, fake_quantize
from graphq.numerics.formats import Format


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, block: Sequence[int], fmt: Format, options: dict[str, Any],
        clip: bool,
    ) -> Tensor:  # fmt: skip
        y = fake_quantize(x, scale, zero, block, fmt, **options)
        ctx.save_for_backward(x, scale, zero, y)
        ctx.about = block, fmt, options.get("narrow_range", False), clip
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale, zero, y = ctx.saved_tensors
        block, fmt, narrow, clip = ctx.about
        wide_scale, wide_zero = expand(scale, x.shape, block), expand(zero, x.shape, block)
        lowest, highest = fmt.limits(narrow)
        v = x / wide_scale
        inside = (v >= lowest - wide_zero) & (v <= highest - wide_zero)
        grads: list[Tensor | None] = [torch.where(inside, grad, 0.0) if clip else grad, None, None]
        if ctx.needs_input_grad[1]:
            each = grad * (y / wide_scale - torch.where(inside, v, 0.0))
            values = x.numel() / max(scale.numel(), 1)
            total = blocks_of(each, block).sum(-1).reshape(scale.shape)
            grads[1] = total / math.sqrt(values * max(highest, 1.0))
        if ctx.needs_input_grad[2]:
            each = torch.where(inside, 0.0, grad * -wide_scale)
            grads[2] = blocks_of(each, block).sum(-1).reshape(zero.shape)
        return (*grads, None, None, None, None)


class _Round(torch.autograd.Function):
    """Rounding that lets the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: bool) -> Tensor:
        return torch.ceil(x) if up else torch.round(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Relative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, growth: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return scale * growth

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        return None, grad / scale


def relative(scale: Tensor, growth: Tensor) -> Tensor:
    """scale · growth, for a growth that is learned in place of the scale.

    Its gradient is that of the scale divided by (not times) the scale: a step of SGD moves the scale as if it were
    learned itself, and a step of Adam, whose size is the learning rate, moves it by that share and not by that much.
    """
    result: Tensor = _Relative.apply(scale, growth)
    return result


def round_through(x: Tensor) -> Tensor:
    """Half to even forward, the identity backward."""
    result: Tensor = _Round.apply(x, False)
    return result


def ceil_through(x: Tensor) -> Tensor:
    """Up forward, the identity backward: the exponent of a trained threshold (TQT, arXiv 1903.08066)."""
    result: Tensor = _Round.apply(x, True)
    return result


def fake_quantize_through(
    x: Tensor, scale: Tensor, zero: Tensor, block: Sequence[int], fmt: Format, *, clip: bool = True, **options: Any
) -> Tensor:
    """`fake_quantize` with gradients for x, the scale and a zero point in float (a whole number)."""
    result: Tensor = _FakeQuantize.apply(x, scale, zero, block, fmt, options, clip)
    return result
