"""Recognize layer norm and RMS norm in graphs where they were traced as their formulas."""

import torch
from torch import fx

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite

aten = torch.ops.aten


def _over_last(m: Match) -> str | None:
    rank = len(m.x.shape)
    if [d % rank for d in m.dims] != [rank - 1]:
        return "the mean is not over the last dimension"
    if not isinstance(m.x.shape[-1], int):
        return "the size of the last dimension is not known"
    for name in ("gamma", "beta"):
        if name not in m.pattern.captures:
            continue
        if not isinstance(m.node(name), fx.Node) or tuple(getattr(m, name).shape) != (m.x.shape[-1],):
            return f"{name} is not one value per feature"
    return m.not_float("x") if isinstance(m.eps, float) and m.keepdim is True else "epsilon is computed"


class LayerNormBySqrt(Rewrite):
    """d = x - mean(x);  d / sqrt(mean(d²) + eps) · gamma + beta  ⇒  layer_norm(x, gamma, beta, eps)."""

    @staticmethod
    def pattern(op, x, gamma, beta, eps, dims, keepdim):
        d = x - op.mean(x, dims, keepdim, dtype=None)
        var = op.mean(op.either(op.pow(d, 2.0), d * d), dims, keepdim, dtype=None)
        unit = op.either(d / op.sqrt(var + eps), d * op.rsqrt(var + eps))
        return unit * gamma + beta

    @staticmethod
    def check(m: Match) -> str | None:
        return _over_last(m)

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.layer_norm.default, m.x, [m.x.shape[-1]], m.gamma, m.beta, m.eps)


class RmsNorm(Rewrite):
    """x · rsqrt(mean(x²) + eps) · gamma  ⇒  rms_norm(x, gamma, eps)."""

    @staticmethod
    def pattern(op, x, gamma, eps, dims, keepdim):
        power = op.either(op.pow(x, 2.0), x * x)
        return gamma * (x * op.rsqrt(op.mean(power, dims, keepdim, dtype=None) + eps))

    @staticmethod
    def check(m: Match) -> str | None:
        return _over_last(m)

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.rms_norm.default, m.x, [m.x.shape[-1]], m.gamma, m.eps)
