"""One form for convolution: padding as numbers, never as a word."""

import torch

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite


class ConvSame(Rewrite):
    """conv.padding(x, w, b, padding="same" | "valid")  ⇒  conv(x, w, b, padding=[…])."""

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.conv_padding(x, weight, bias)

    @staticmethod
    def check(m: Match) -> str | None:
        if m.root.arg("padding") == "valid":
            return None
        kernel = m.weight.shape[2:]
        uneven = any(d * (k - 1) % 2 for d, k in zip(_full(m.root.arg("dilation"), kernel), kernel, strict=True))
        return "'same' pads one side more than the other" if uneven else None

    @staticmethod
    def rewrite(m: Match):
        kernel = m.weight.shape[2:]
        dilation = _full(m.root.arg("dilation"), kernel)
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        if m.root.arg("padding") == "valid":
            padding = [0] * len(kernel)
        target = getattr(torch.ops.aten, f"conv{len(kernel)}d").default
        stride = _full(m.root.arg("stride"), kernel)
        return m.call(target, m.x, m.weight, m.bias, stride, padding, dilation, m.root.arg("groups"))


def _full(values, kernel):
    values = list(values)
    return values * len(kernel) if len(values) == 1 else values
