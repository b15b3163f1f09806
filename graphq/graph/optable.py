"""The op table: which ATen ops are one family, which commute.

Patterns, selectors and targets speak of families ("conv"), so that a rule written once holds for conv1d, conv2d
and conv3d, in place or not.
"""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

FAMILIES: dict[str, tuple[str, ...]] = {
    "conv": ("conv1d", "conv2d", "conv3d"),
    "conv_padding": ("conv1d.padding", "conv2d.padding", "conv3d.padding"),
    "conv_transpose": ("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"),
    "linear": ("linear",),
    "addmm": ("addmm",),
    "matmul": ("matmul", "mm", "bmm"),
    "attention": ("scaled_dot_product_attention",),
    "embedding": ("embedding",),
    "batch_norm": ("batch_norm",),
    "native_batch_norm": ("_native_batch_norm_legit_no_training",),
    "layer_norm": ("layer_norm",),
    "group_norm": ("group_norm",),
    "rms_norm": ("rms_norm",),
    "softmax": ("softmax.int", "_softmax"),
    "add": ("add.Tensor", "add.Scalar"),
    "sub": ("sub.Tensor", "sub.Scalar"),
    "rsub": ("rsub.Tensor", "rsub.Scalar"),
    "mul": ("mul.Tensor", "mul.Scalar"),
    "div": ("div.Tensor", "div.Scalar"),
    "pow": ("pow.Tensor_Scalar", "pow.Tensor_Tensor"),
    "mean": ("mean.dim",),
    "rsqrt": ("rsqrt",),
    "sqrt": ("sqrt",),
    "exp": ("exp",),
    "erf": ("erf",),
    "tanh": ("tanh",),
    "sum": ("sum.dim_IntList",),
    "amax": ("amax",),
    "relu": ("relu",),
    "clip": ("hardtanh", "relu6", "clamp", "clamp_min"),
    "leaky_relu": ("leaky_relu",),
    "sigmoid": ("sigmoid",),
    "silu": ("silu",),
    "gelu": ("gelu",),
    "hardswish": ("hardswish",),
    "hardsigmoid": ("hardsigmoid",),
    "cat": ("cat",),
    "max_pool": ("max_pool1d", "max_pool2d", "max_pool3d"),
    "avg_pool": ("avg_pool1d", "avg_pool2d", "avg_pool3d"),
    "adaptive_avg_pool": ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    "reshape": ("view", "_unsafe_view", "reshape", "flatten.using_ints", "unflatten.int", "squeeze.dim", "squeeze",
                "squeeze.dims", "unsqueeze"),
    "transpose": ("transpose.int", "permute", "t", "movedim.int"),
    "slice": ("slice.Tensor", "select.int", "narrow"),
    "split": ("split.Tensor", "split_with_sizes", "chunk", "unbind.int"),
    "expand": ("expand",),
    "gather": ("index_select", "gather"),
    "tile": ("repeat",),
    "where": ("where.self",),
    "pad": ("pad", "constant_pad_nd"),
    "resize": ("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_bilinear2d.vec", "upsample_nearest1d",
               "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d.vec"),
    "roll": ("roll",),
    "dropout": ("dropout", "feature_dropout", "native_dropout"),
    "cast": ("to.dtype", "to.device", "to.dtype_layout", "to.other", "_to_copy", "type_as"),
    "getitem": (),  # operator.getitem: one of several outputs
    "identity": ("clone", "contiguous", "alias", "detach", "lift_fresh_copy"),
    "assert": ("_assert_tensor_metadata", "_assert_async.msg", "_assert_scalar", "sym_constrain_range_for_size",
               "sym_constrain_range"),
}  # fmt: skip

COMMUTATIVE = frozenset({"add", "mul"})


@cache
def overloads(family: str) -> tuple[Any, ...]:
    """The OpOverloads of a family; a name without overload means `.default`."""
    if family == "getitem":
        return (operator.getitem,)
    found = []
    for name in FAMILIES[family]:
        packet, _, overload = name.partition(".")
        found.append(getattr(getattr(torch.ops.aten, packet), overload or "default"))
    return tuple(found)


@cache
def _by_target() -> dict[Any, str]:
    return {target: family for family in FAMILIES for target in overloads(family)}


def family_of(target: object) -> str:
    """The family of an op, or its own name ("topk") when the table has no row for it."""
    family = _by_target().get(target)
    if family is not None:
        return family
    return target._schema.name.partition("::")[2] if isinstance(target, OpOverload) else str(target)
