"""Recognize gelu in graphs where it was traced as its formula."""

import math

import torch

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite

aten = torch.ops.aten


class ErfGelu(Rewrite):
    """x · 0.5 · (1 + erf(x / √2))  ⇒  gelu(x)."""

    @staticmethod
    def pattern(op, x):
        inner = op.either(x / math.sqrt(2.0), x * math.sqrt(0.5))
        gate = op.erf(inner) + 1.0
        return op.either((x * 0.5) * gate, x * (gate * 0.5), (x * gate) * 0.5)

    @staticmethod
    def check(m: Match) -> str | None:
        return m.not_float("x")

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.gelu.default, m.x)


class TanhGelu(Rewrite):
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))  ⇒  gelu(x, approximate="tanh")."""

    @staticmethod
    def pattern(op, x):
        cube = op.either(op.pow(x, 3.0), (x * x) * x)
        gate = op.tanh((x + cube * 0.044715) * math.sqrt(2.0 / math.pi)) + 1.0
        return op.either((x * 0.5) * gate, x * (gate * 0.5), (x * gate) * 0.5)

    @staticmethod
    def check(m: Match) -> str | None:
        return m.not_float("x")

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.gelu.default, m.x, approximate="tanh")
