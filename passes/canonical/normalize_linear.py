"""One form for the product with a parameter: linear(x, weight [out, in], bias [out])."""

import torch

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite

aten = torch.ops.aten


def _weight(m: Match):
    """The weight as [out, in], whether the graph multiplies by a transposed parameter or by the parameter itself."""
    if m.matrix.family == "transpose" and m.matrix.node.args[0].op == "get_attr":
        source = m.matrix.node.args[0]
        if len(source.meta["val"].shape) == 2:
            return source
    return m.param(f"{m.matrix.node.target}_t", m.matrix.tensor.t().contiguous())


def _is_weight(m: Match) -> str | None:
    if m.matrix.family == "transpose" and m.matrix.node.args[0].op == "get_attr":
        return None if len(m.matrix.shape) == 2 else "the weight is not a matrix"
    if m.matrix.tensor is None:
        return "the second factor is computed, not a parameter"
    return None if m.matrix.tensor.ndim == 2 else "the weight is not a matrix"


class Addmm(Rewrite):
    """addmm(bias, x, weightᵀ)  ⇒  linear(x, weight, bias)."""

    @staticmethod
    def pattern(op, x, matrix, bias):
        return op.addmm(bias, x, matrix)

    @staticmethod
    def check(m: Match) -> str | None:
        if m.root.arg("alpha") != 1 or m.root.arg("beta") != 1:
            return "alpha or beta is not 1"
        if len(m.bias.shape) != 1:
            return "the bias is not a vector"
        return _is_weight(m)

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.linear.default, m.x, _weight(m), m.bias)


class MatmulParameter(Rewrite):
    """matmul(x, weightᵀ)  ⇒  linear(x, weight)."""

    @staticmethod
    def pattern(op, x, matrix):
        return op.matmul(x, matrix)

    @staticmethod
    def check(m: Match) -> str | None:
        return _is_weight(m)

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.linear.default, m.x, _weight(m))


class AddBias(Rewrite):
    """linear(x, weight) + bias  ⇒  linear(x, weight, bias), bias a parameter [out]."""

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.linear(x, weight, None) + bias

    @staticmethod
    def check(m: Match) -> str | None:
        if m.linear.users > 1:
            return "the product is used without the bias too"
        if len(m.linear.shape) < 2 or len(m.weight.shape) != 2:
            return "it is a product of vectors"
        if not hasattr(m.bias, "tensor") or m.bias.tensor is None:
            return "what is added is not a parameter"
        if tuple(m.bias.tensor.shape) != (m.weight.shape[0],):
            return "what is added is not one value per output channel"
        return None

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.linear.default, m.x, m.weight, m.bias, like=m.linear)
