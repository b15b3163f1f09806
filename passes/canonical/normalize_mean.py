"""The mean over all spatial dimensions is global average pooling, for which runtimes have an integer kernel."""

import torch

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite

aten = torch.ops.aten


class GlobalMean(Rewrite):
    """mean(x [n, c, h, w], dims (2, 3))  ⇒  adaptive_avg_pool2d(x, 1) (── flatten, without keepdim)."""

    @staticmethod
    def pattern(op, x, dims, keepdim):
        return op.mean(x, dims, keepdim, dtype=None)

    @staticmethod
    def check(m: Match) -> str | None:
        rank = len(m.x.shape)
        if rank != 4:
            return "not an image [n, c, h, w]"
        return None if sorted(d % rank for d in m.dims) == [2, 3] else "not the mean over all spatial dimensions"

    @staticmethod
    def rewrite(m: Match):
        pooled = m.call(aten.adaptive_avg_pool2d.default, m.x, [1, 1])
        value = m.x.node.meta["val"]
        pooled.meta["val"] = value.new_empty(*value.shape[:2], 1, 1)
        return pooled if m.keepdim else m.call(aten.flatten.using_ints, pooled, 1)
