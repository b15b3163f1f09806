"""Recognize silu in graphs where it was traced as its formula."""

import torch

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite


class Silu(Rewrite):
    """x · sigmoid(x)  ⇒  silu(x)."""

    @staticmethod
    def pattern(op, x):
        return x * op.sigmoid(x)

    @staticmethod
    def check(m: Match) -> str | None:
        return "the sigmoid is used by itself too" if m.sigmoid.users > 1 else m.not_float("x")

    @staticmethod
    def rewrite(m: Match):
        return m.call(torch.ops.aten.silu.default, m.x)
