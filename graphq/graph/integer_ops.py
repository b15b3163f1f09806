"""Integer kernels, bit for bit: graphq::qconv, qgemm, qmatmul, qadd, qaverage_pool.

Products are summed as int32 (in float32 where no partial sum can pass 2^24, else in float64: exact). The sum becomes
float32, is multiplied by one float32 multiplier per output channel, rounded half to even, moved by the zero point and
saturated: what the kernels of ONNX Runtime (MLAS) do. Scales are float32 [], or [out] for weights; zero points int32
[]. saturating: products of neighbours along K are added in int16, as on x86 without VNNI (u8·s8 only).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphq.graph.ops import parse_format
from graphq.numerics.pairs import along_k, lost_to_int16

REPLACES = "graphq_replaces"  # in a node's meta: the name of the converted graph's node whose value it computes


def name_in_file(node: fx.Node) -> str:
    """The name that the exported file gives to what a node of the integer graph computes."""
    name: str = node.meta.get(REPLACES, node.name)
    return name


def requantize(total: Tensor, multiplier: Tensor, zero_point: Tensor, format: str) -> Tensor:
    """Sums (integers in float64) → codes."""
    fmt, _ = parse_format(format)
    scaled = total.float() * multiplier
    low, high = (limit - zero_point for limit in fmt.limits())
    return (torch.round(scaled.clamp(low.float(), high.float())) + zero_point).to(fmt.storage)


def exact_dtype(w: Tensor) -> torch.dtype:
    """A float dtype in which every partial sum of x · w is exact, for x up to 255 and w [out, …]."""
    largest = 255 * w.to(torch.int32).abs().flatten(1).sum(1).max().item()
    return torch.float32 if largest < 2**24 and w.device.type == "cpu" else torch.float64


def centered_weight(w: Tensor, zero: Tensor) -> Tensor:
    """Codes [out, …] without their zero points, [] or one a row."""
    zero = zero.to(torch.int32)
    return w.to(torch.int32) - (zero.reshape(-1, *[1] * (w.ndim - 1)) if zero.numel() > 1 else zero.reshape(()))


def _channels(values: Tensor, rank: int) -> Tensor:
    """[out] or [] → [1, out, 1, …] for a result of that rank."""
    return values.reshape(1, -1, *[1] * (rank - 2)) if values.numel() > 1 else values.reshape(())


@torch.library.custom_op("graphq::qconv", mutates_args=())
def qconv(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    bias: Tensor | None,
    y_scale: Tensor,
    y_zero: Tensor,
    format: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    outer_padding: Sequence[int],
    saturating: bool = False,
) -> Tensor:
    """QLinearConv: x [n, in, …] codes, w [out, in / groups, …] codes, bias [out] int32 → codes.

    outer_padding: zeros around x in the order of torch's pad, in front of the convolution's own padding.
    """
    codes, w = w, centered_weight(w, w_zero)
    dtype = exact_dtype(w)
    centered = torch.nn.functional.pad((x.to(torch.int32) - x_zero).to(dtype), list(outer_padding))
    conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[w.ndim - 3]
    total = conv(centered, w.to(dtype), None, list(stride), list(padding), list(dilation), groups)
    if saturating and _pairs_meet(x, codes) and not _depthwise(codes, groups):
        patches = columns(centered, codes, stride, padding, dilation) + x_zero.to(dtype)
        total = total.double() + _lost(patches, codes, groups)
    if bias is not None:
        total = total.double() + _channels(bias.double(), total.ndim)
    multiplier = (x_scale * w_scale.reshape(-1)) / y_scale
    return requantize(total, _channels(multiplier, total.ndim), y_zero, format)


def _pairs_meet(x: Tensor, w: Tensor) -> bool:
    """Does the kernel for these codes add pairs in int16?"""
    return x.dtype == torch.uint8 and w.dtype == torch.int8


def _depthwise(w: Tensor, groups: int) -> bool:
    return groups > 1 and groups == w.shape[0] and w.shape[1] == 1


def columns(x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """x [n, in, …] → [n, positions …, kernel positions …, in]: what each output position multiplies with the weight."""
    x = torch.nn.functional.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for axis, (size, step, gap) in enumerate(zip(w.shape[2:], stride, dilation, strict=True), start=2):
        x = x.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    spatial = w.ndim - 2
    return x.permute(0, *range(2, 2 + 2 * spatial), 1)


def _lost(columns: Tensor, w: Tensor, groups: int) -> Tensor:
    """What a convolution's sums lose to int16 [n, out, …]."""
    spatial = w.ndim - 2
    parts = []
    for x, rows in zip(columns.chunk(groups, -1), along_k(w).chunk(groups), strict=True):
        flat = x.flatten(1 + spatial).flatten(0, spatial)
        parts.append(lost_to_int16(flat, rows.to(x.dtype)).unflatten(0, x.shape[: 1 + spatial]))
    return torch.cat(parts, -1).movedim(-1, 1)


@torch.library.custom_op("graphq::qgemm", mutates_args=())
def qgemm(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero: Tensor,
    bias: Tensor | None,
    y_scale: Tensor | None,
    y_zero: Tensor | None,
    format: str,
    saturating: bool = False,
) -> Tensor:
    """QGemm, MatMulIntegerToFloat: x […, in] codes, w [out, in] codes, bias [out] int32 → codes, or float32 without
    y_scale."""
    codes, w = w, centered_weight(w, w_zero)
    dtype = exact_dtype(w)
    total = torch.nn.functional.linear((x.to(torch.int32) - x_zero).to(dtype), w.to(dtype))
    if saturating and _pairs_meet(x, codes):
        loss = lost_to_int16(x.reshape(-1, x.shape[-1]).to(dtype), codes.to(dtype))
        total = total.double() + loss.reshape(total.shape)
    if bias is not None:
        total = total.double() + bias.double()
    scale = x_scale * w_scale.reshape(-1)
    if y_scale is None or y_zero is None:
        return total.float() * scale
    return requantize(total, scale / y_scale, y_zero, format)


@torch.library.custom_op("graphq::qmatmul", mutates_args=())
def qmatmul(
    x: Tensor,
    x_scale: Tensor,
    x_zero: Tensor,
    y: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    z_scale: Tensor | None = None,
    z_zero: Tensor | None = None,
    format: str = "uint8",
) -> Tensor:
    """QLinearMatMul, MatMulIntegerToFloat of two activations: x […, n, k] codes, y […, k, m] codes → codes, or float32
    without z_scale."""
    total = (x.to(torch.int32) - x_zero).double() @ (y.to(torch.int32) - y_zero).double()
    scale = x_scale * y_scale
    if z_scale is None or z_zero is None:
        return total.float() * scale
    return requantize(total, scale / z_scale, z_zero, format)


def _fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x · y + z in float32 with one rounding, as a fused multiply-add does it."""
    return (x.double() * y.double() + z.double()).float()


@torch.library.custom_op("graphq::qadd", mutates_args=())
def qadd(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
    format: str,
) -> Tensor:
    """QLinearAdd: codes of a and b → codes; the ratios of scales and the constant part are float32."""
    fmt, _ = parse_format(format)
    a_ratio, b_ratio = a_scale / y_scale, b_scale / y_scale
    moved = _fused(a_zero, a_ratio, b_ratio * b_zero.float())
    total = _fused(a, a_ratio, _fused(b, b_ratio, y_zero.float() - moved))
    return torch.round(total).clamp(*fmt.limits()).to(fmt.storage)


@torch.library.custom_op("graphq::qaverage_pool", mutates_args=())
def qaverage_pool(x: Tensor, x_scale: Tensor, x_zero: Tensor, y_scale: Tensor, y_zero: Tensor, format: str) -> Tensor:
    """QLinearGlobalAveragePool: codes [n, c, …] → codes [n, c, 1, …]."""
    dims = list(range(2, x.ndim))
    count = x[0, 0].numel()
    total = (x.to(torch.int32) - x_zero).double().sum(dims, keepdim=True)
    return requantize(total, x_scale / (y_scale * count), y_zero, format)


def codes_like(value: Tensor, format: str) -> Tensor:
    """An empty tensor for the codes of a value."""
    return torch.empty_like(value, dtype=parse_format(format)[0].storage)


@qconv.register_fake
def _(x, x_scale, x_zero, w, w_scale, w_zero, bias, y_scale, y_zero, format, stride, padding, dilation, groups,
      outer_padding, saturating=False):  # type: ignore[no-untyped-def]  # fmt: skip
    padded = torch.nn.functional.pad(x.float(), list(outer_padding))
    conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[w.ndim - 3]
    return codes_like(conv(padded, w.float(), None, list(stride), list(padding), list(dilation), groups), format)


@qgemm.register_fake
def _(x, x_scale, x_zero, w, w_scale, w_zero, bias, y_scale, y_zero, format, saturating=False):  # type: ignore[no-untyped-def]
    result = x.new_empty(*x.shape[:-1], w.shape[0], dtype=torch.float32)
    return result if y_scale is None else codes_like(result, format)


@qmatmul.register_fake
def _(x, x_scale, x_zero, y, y_scale, y_zero, z_scale=None, z_zero=None, format="uint8"):  # type: ignore[no-untyped-def]
    result = x.float() @ y.float()
    return result if z_scale is None else codes_like(result, format)


@qadd.register_fake
def _(a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero, format):  # type: ignore[no-untyped-def]
    return codes_like(a.float() + b.float(), format)


@qaverage_pool.register_fake
def _(x, x_scale, x_zero, y_scale, y_zero, format):  # type: ignore[no-untyped-def]
    return codes_like(x.new_empty(*x.shape[:2], *[1] * (x.ndim - 2)), format)


QCONV = torch.ops.graphq.qconv.default
QGEMM = torch.ops.graphq.qgemm.default
QMATMUL = torch.ops.graphq.qmatmul.default
QADD = torch.ops.graphq.qadd.default
QAVERAGE_POOL = torch.ops.graphq.qaverage_pool.default
