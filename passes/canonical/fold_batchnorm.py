"""Fold inference batch norm into the weighted op next to it.

A batch norm is y = x · s + t per channel, with s = gamma / sqrt(var + eps) and t = beta - mean · s.
All folding is computed in float64 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite

aten = torch.ops.aten


def affine_of(m: Match) -> tuple[Tensor, Tensor]:
    """(s, t) of the matched batch norm, float64 [channels]."""
    mean, var = m.tensor("mean"), m.tensor("var")
    assert mean is not None and var is not None
    gamma, beta = m.tensor("gamma"), m.tensor("beta")
    s = torch.rsqrt(var.double() + m.batch_norm.arg("eps"))
    s = s if gamma is None else s * gamma.double()
    t = -mean.double() * s
    return s, t if beta is None else t + beta.double()


def foldable(m: Match) -> str | None:
    """Why the batch norm is not a constant affine map, or None."""
    if m.batch_norm.arg("training"):
        return "the batch norm is in training mode"
    if m.tensor("mean") is None or m.tensor("var") is None:
        return "it has no running statistics"
    if any(getattr(m, name) is not None and m.tensor(name) is None for name in ("gamma", "beta")):
        return "its scale or shift is computed"
    return None


def constant_weight(m: Match, op_name: str) -> str | None:
    """Why the op before the batch norm cannot take it in, or None."""
    if m.tensor("weight") is None:
        return "the weight is computed"
    if m.bias is not None and m.tensor("bias") is None:
        return "the bias is computed"
    if getattr(m, op_name).users > 1:
        return f"the {op_name} feeds something besides the batch norm"
    return foldable(m)


def folded_bias(m: Match, s: Tensor, t: Tensor) -> Tensor:
    bias, weight = m.tensor("bias"), m.tensor("weight")
    assert weight is not None
    return (t if bias is None else bias.double() * s + t).to(weight.dtype)


def rebuild(m: Match, op_name: str, weight: Tensor, bias: Tensor):
    """The op again with other parameters; its remaining arguments stay."""
    view = getattr(m, op_name)
    new = [
        m.x,
        m.param(f"{m.weight.node.target}_folded", weight),
        m.param(f"{m.weight.node.target}_bias_folded", bias),
    ]
    return m.call(view.node.target, *new, *view.node.args[3:], like=view, **_rest(view.node.kwargs))


def _rest(kwargs):
    return {k: v for k, v in kwargs.items() if k != "bias"}


class FoldBatchNormIntoConv(Rewrite):
    """x ── conv ── batch_norm ── y  ⇒  x ── conv' ── y."""

    @staticmethod
    def pattern(op, x, weight, bias, gamma, beta, mean, var):
        return op.batch_norm(op.conv(x, weight, bias), gamma, beta, mean, var)

    @staticmethod
    def check(m: Match) -> str | None:
        return constant_weight(m, "conv")

    @staticmethod
    def rewrite(m: Match):
        s, t = affine_of(m)
        w = m.tensor("weight")
        weight = (w.double() * s.view(-1, *[1] * (w.ndim - 1))).to(w.dtype)
        return rebuild(m, "conv", weight, folded_bias(m, s, t))


class FoldBatchNormIntoConvTranspose(Rewrite):
    """x ── conv_transpose ── batch_norm ── y  ⇒  x ── conv_transpose' ── y; weight [in, out / groups, …]."""

    @staticmethod
    def pattern(op, x, weight, bias, gamma, beta, mean, var):
        return op.batch_norm(op.conv_transpose(x, weight, bias), gamma, beta, mean, var)

    @staticmethod
    def check(m: Match) -> str | None:
        return constant_weight(m, "conv_transpose")

    @staticmethod
    def rewrite(m: Match):
        s, t = affine_of(m)
        w, groups = m.tensor("weight"), m.conv_transpose.arg("groups")
        by_group = w.double().view(groups, w.shape[0] // groups, *w.shape[1:])
        weight = by_group * s.view(groups, 1, w.shape[1], *[1] * (w.ndim - 2))
        return rebuild(m, "conv_transpose", weight.view(w.shape).to(w.dtype), folded_bias(m, s, t))


class FoldBatchNormIntoLinear(Rewrite):
    """x [n, in] ── linear ── batch_norm ── y  ⇒  x ── linear' ── y."""

    @staticmethod
    def pattern(op, x, weight, bias, gamma, beta, mean, var):
        return op.batch_norm(op.linear(x, weight, bias), gamma, beta, mean, var)

    @staticmethod
    def check(m: Match) -> str | None:
        if len(m.linear.shape) != 2:
            return "the norm's channels are not the linear's outputs"
        return constant_weight(m, "linear")

    @staticmethod
    def rewrite(m: Match):
        s, t = affine_of(m)
        w = m.tensor("weight")
        return rebuild(m, "linear", (w.double() * s[:, None]).to(w.dtype), folded_bias(m, s, t))


class FoldBatchNormIntoNextConv(Rewrite):
    """x ── batch_norm ── conv (no padding) ── y  ⇒  x ── conv' ── y.

    With padding it would be wrong: the pad is zero after the norm, not before it.
    """

    @staticmethod
    def pattern(op, x, weight, bias, gamma, beta, mean, var):
        return op.conv(op.batch_norm(x, gamma, beta, mean, var), weight, bias)

    @staticmethod
    def check(m: Match) -> str | None:
        if m.batch_norm.users > 1:
            return "the batch norm feeds something besides the convolution"
        if any(m.conv.arg("padding")):
            return "the convolution pads"
        if m.tensor("weight") is None or (m.bias is not None and m.tensor("bias") is None):
            return "the weight or bias is computed"
        return foldable(m)

    @staticmethod
    def rewrite(m: Match):
        s, t = affine_of(m)
        w, groups = m.tensor("weight").double(), m.conv.arg("groups")
        out_per_group = w.shape[0] // groups

        def per_input(v: Tensor) -> Tensor:
            """[in] → [out, in / groups, 1, …]: the value that meets each weight."""
            rows = v.view(groups, 1, w.shape[1]).expand(groups, out_per_group, w.shape[1])
            return rows.reshape(w.shape[0], w.shape[1], *[1] * (w.ndim - 2))

        bias = (w * per_input(t)).flatten(1).sum(1)
        if m.bias is not None:
            bias = bias + m.tensor("bias").double()
        dtype = m.tensor("weight").dtype
        return rebuild(m, "conv", (w * per_input(s)).to(dtype), bias.to(dtype))


class FoldBatchNormAfterCat(Rewrite):
    """a, b ── cat(channels) ── batch_norm ── y  ⇒  a ── batch_norm, b ── batch_norm ── cat ── y.

    The pieces then fold into the convolutions that made a and b.
    """

    @staticmethod
    def pattern(op, x, weight, bias, gamma, beta, mean, var):
        branch = op.one_of("conv", "conv_transpose")(x, weight, bias)
        return op.batch_norm(op.cat(op.each(branch), 1), gamma, beta, mean, var)

    @staticmethod
    def check(m: Match) -> str | None:
        if m.cat.users > 1:
            return "the concatenation feeds something besides the batch norm"
        return foldable(m)

    @staticmethod
    def rewrite(m: Match):
        start, pieces = 0, []
        rest = m.batch_norm.node.args[5:]
        for tensor in m.cat.node.args[0]:
            channels = tensor.meta["val"].shape[1]
            params = []
            for name in ("gamma", "beta", "mean", "var"):
                value = m.tensor(name)
                part = None if value is None else value[start : start + channels].clone()
                source = m.node(name)
                params.append(None if part is None else m.param(f"{source.target}_part", part))
            piece = m.call(aten.batch_norm.default, tensor, *params, *rest)
            piece.meta["val"] = tensor.meta["val"]
            pieces.append(piece)
            start += channels
        return m.call(aten.cat.default, pieces, 1, like=m.cat)


class FoldBatchNormAfterSplit(Rewrite):
    """x ── conv ── split(channels) ── getitem i ── batch_norm ── y  ⇒  x ── conv' ── split ── getitem i ── y.

    Only the rows of the weight that make part i are scaled, so that the other parts stay as they are.
    """

    @staticmethod
    def pattern(op, x, weight, bias, sizes, index, gamma, beta, mean, var):
        parts = op.split(op.conv(x, weight, bias), sizes, 1)
        return op.batch_norm(op.getitem(parts, index), gamma, beta, mean, var)

    @staticmethod
    def check(m: Match) -> str | None:
        if m.getitem.users > 1:
            return "the part feeds something besides the batch norm"
        if m.split.op not in ("aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default"):
            return "not a split into parts"
        return constant_weight(m, "conv")

    @staticmethod
    def rewrite(m: Match):
        s, t = affine_of(m)
        w = m.tensor("weight")
        before = sum(v.shape[1] for v in m.split.node.meta["val"][: m.index])
        rows = slice(before, before + len(s))
        scale, shift = w.new_ones(len(w), dtype=torch.float64), w.new_zeros(len(w), dtype=torch.float64)
        scale[rows], shift[rows] = s, t
        weight = (w.double() * scale.view(-1, *[1] * (w.ndim - 1))).to(w.dtype)
        conv = m.conv.node
        new = rebuild(m, "conv", weight, folded_bias(m, scale, shift))
        for node in (new.args[1], new.args[2], new):  # the other parts are read before the root, so move it up
            conv.prepend(node)
        conv.replace_all_uses_with(new)
        m.gm.graph.erase_node(conv)
        m.nodes.remove(conv)
        return m.getitem
