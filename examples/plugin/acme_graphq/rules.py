"""What is quantized together around acme::swiglu, and how it is taken apart for a runtime that has no such kernel."""

import torch

from graphq.authoring import QuantPattern, Rewrite

from .ops import GATE, SWIGLU


class SwiGLU(QuantPattern):
    """x ─ Q ─ swiglu, weight ─ Q ─."""

    family, head, weight, bias = "swiglu", "swiglu", "weight", "bias"

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.aten(SWIGLU, name="swiglu")(x, weight, bias)


class SplitSwiGLU(Rewrite):
    """swiglu(x, w, b)  ⇒  gate(linear(x, w, b)): the product becomes an integer kernel, the gate stays float."""

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.aten(SWIGLU, name="swiglu")(x, weight, bias)

    @staticmethod
    def rewrite(m):
        return m.call(GATE, m.call(torch.ops.aten.linear.default, m.x, m.weight, m.bias, like=m.swiglu))
