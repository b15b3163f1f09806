"""The graphq:: operators and their reference semantics.

    quantize(x, scale, zero_point, block, format)          float tensor → codes
    dequantize(codes, scale, zero_point, block, format)    codes → float32 tensor
    choose_qparams(x, block, format, kind, overall)        → scale, zero point of this very tensor (dynamic specs)

The first two are the only quantization ops between convert and lower. `block` is the block shape of
`graphq.numerics.affine`. `format` is a name of the format table, "!" for the narrow range, and what differs from the
usual: "int8!", "fp8_e5m2:unsaturated", "int4:floor", "fp4_e2m1:e8m0" (E8M0 scales). `kind` says the same of scales:
"symmetric e8m0 even positive".
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphq.config.spec import QuantSpec
from graphq.numerics import affine, scales
from graphq.numerics.formats import Format, get_format


def format_text(spec: QuantSpec) -> str:
    """What `format` says of a spec."""
    text = spec.format + ("!" if spec.narrow_range else "")
    text += "" if spec.rounding == "half_even" else f":{spec.rounding}"
    text += ":e8m0" if spec.scale == "e8m0" else ""
    return text + ("" if spec.saturate else ":unsaturated")


def kind_text(spec: QuantSpec) -> str:
    """What `kind` says of a spec."""
    return f"{'symmetric' if spec.symmetric else 'affine'} {spec.scale} {spec.scale_mode} {spec.span}"


def parse_format(text: str) -> tuple[Format, bool]:
    """("int8!") → (the int8 row, narrow range)."""
    name = text.partition(":")[0]
    return get_format(name.removesuffix("!")), name.endswith("!")


@torch.library.custom_op("graphq::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], format: str) -> Tensor:
    fmt, narrow = parse_format(format)
    flags = set(format.split(":")[1:])
    rounding: Any = next(iter(flags - {"unsaturated", "e8m0"}), "half_even")
    return affine.quantize(
        x, scale, zero_point, block, fmt, narrow_range=narrow, rounding=rounding, saturate="unsaturated" not in flags
    )


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], format: str) -> Tensor:
    return torch.empty_like(x, dtype=parse_format(format)[0].storage)


@torch.library.custom_op("graphq::dequantize", mutates_args=())
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], format: str) -> Tensor:
    return affine.dequantize(codes, scale, zero_point, block, parse_format(format)[0])


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, block: Sequence[int], format: str) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


@torch.library.custom_op("graphq::choose_qparams", mutates_args=())
def choose_qparams(
    x: Tensor, block: Sequence[int], format: str, kind: str, overall: Tensor | None
) -> tuple[Tensor, Tensor]:
    fmt, narrow = parse_format(format)
    symmetry, scale, mode, span = kind.split()
    options: Any = {"scale": scale, "mode": mode, "span": span, "overall": overall}
    lo, hi = affine.unmasked_range(x, block)
    return scales.choose_qparams(lo, hi, fmt, symmetric=symmetry == "symmetric", narrow_range=narrow, **options)


@choose_qparams.register_fake
def _(x: Tensor, block: Sequence[int], format: str, kind: str, overall: Tensor | None) -> tuple[Tensor, Tensor]:
    sizes = [1 if b == -1 else -(-d // b) for d, b in zip(x.shape, block, strict=True)] if block else []
    return x.new_empty(sizes, dtype=torch.float32), x.new_empty(sizes, dtype=torch.int32)


@torch.library.custom_op("graphq::here", mutates_args=())
def here(x: Tensor) -> Tensor:
    """Where a registered module wants a quantizer."""
    return x.clone()


@here.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


here.register_autograd(lambda ctx, grad: grad)
HERE = torch.ops.graphq.here.default
AGAIN = "graphq_again"  # in the meta of a quantize that is meant to quantize what has been quantized
OVERALL = "graphq_overall"  # in the meta of a scale of two levels: the largest magnitude of the tensor that it is for
QUANTIZE = torch.ops.graphq.quantize.default
DEQUANTIZE = torch.ops.graphq.dequantize.default
CHOOSE_QPARAMS = torch.ops.graphq.choose_qparams.default


def is_quantization(node: fx.Node) -> bool:
    """Is this node one of ours, and no op of the model?"""
    if node.target is operator.getitem:
        return getattr(node.args[0], "target", None) is CHOOSE_QPARAMS
    return node.target in (QUANTIZE, DEQUANTIZE, CHOOSE_QPARAMS)
