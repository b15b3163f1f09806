"""Recognize softmax in graphs where it was traced as its formula."""

import torch

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite


class SoftmaxByExp(Rewrite):
    """e = exp(x - amax(x));  e / sum(e)  ⇒  softmax(x)."""

    @staticmethod
    def pattern(op, x, dims):
        e = op.exp(x - op.amax(x, dims, True))
        return e / op.sum(e, dims, True, dtype=None)

    @staticmethod
    def check(m: Match) -> str | None:
        return m.not_float("x") if len(m.dims) == 1 else "it sums over several dimensions"

    @staticmethod
    def rewrite(m: Match):
        return m.call(torch.ops.aten.softmax.int, m.x, m.dims[0])
