"""Ops between weighted ones: products and sums of activations, activations, pooling, concatenation, normalization."""

from torch import Tensor

from graphq.graph.match import Match
from graphq.graph.view import LayerView, value_of

from .base import QuantPattern
from .mask import is_mask
from .weighted import absorbed_activation


def two_tensors(m: Match) -> str | None:
    """Why an op on a and b is not an op on two float tensors, or None."""
    for operand in (m.a, m.b):
        if not isinstance(operand, LayerView):
            return "an operand is a plain number"
        value = value_of(operand.node)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return "an operand is not a float tensor"
        if is_mask(operand.node):
            return "an operand is an additive mask"
    return None


class Matmul(QuantPattern):
    """a ─ Q ─ matmul ─ Q ─ b."""

    family, head, activations = "matmul", "matmul", ("x", "y")

    @staticmethod
    def pattern(op, x, y):
        return op.matmul(x, y)


class Add(QuantPattern):
    """a ─ Q ─ add ─ Q, b ─ Q ─."""

    family, head, activations = "add", "add", ("a", "b")

    @staticmethod
    def pattern(op, a, b):
        return op.add(a, b)

    @staticmethod
    def check(m: Match) -> str | None:
        return two_tensors(m)


class AddActivation(Add):
    """a ─ Q ─ add ─ relu | clip ─ Q, b ─ Q ─: the end of a residual block."""

    @staticmethod
    def pattern(op, a, b):
        return op.one_of("relu", "clip", name="activation")(op.add(a, b))

    @staticmethod
    def check(m: Match) -> str | None:
        return absorbed_activation(m, "add") or two_tensors(m)


class Mul(QuantPattern):
    """a ─ Q ─ mul ─ Q, b ─ Q ─."""

    family, head, activations = "mul", "mul", ("a", "b")

    @staticmethod
    def pattern(op, a, b):
        return op.mul(a, b)

    @staticmethod
    def check(m: Match) -> str | None:
        return two_tensors(m)


class Where(QuantPattern):
    """where(condition, a, b) ─ Q, a ─ Q ─, b ─ Q ─."""

    family, head, activations = "where", "where", ("a", "b")

    @staticmethod
    def pattern(op, condition, a, b):
        return op.where(condition, a, b)

    @staticmethod
    def check(m: Match) -> str | None:
        return two_tensors(m)


class Attention(QuantPattern):
    """query, key, value ─ Q ─ scaled_dot_product_attention; key and value as a cache would keep them."""

    family, head, activations = "attention", "attention", ("query", "key", "value")
    cached = ("key", "value")

    @staticmethod
    def pattern(op, query, key, value):
        return op.attention(query, key, value)


class Concat(QuantPattern):
    """every input ─ Q ─ cat ─ Q."""

    family, head, activations = "cat", "cat", ("tensors",)

    @staticmethod
    def pattern(op, tensors):
        return op.cat(tensors)


def unary(family_name: str) -> type[QuantPattern]:
    """The pattern of one op on one tensor: x ─ op."""

    def pattern(op, x):
        return getattr(op, family_name)(x)

    name = "".join(part.capitalize() for part in family_name.split("_"))
    body = {"family": family_name, "head": family_name, "pattern": staticmethod(pattern)}
    return type(name, (QuantPattern,), {**body, "__doc__": f"x ─ {family_name}.", "__module__": __name__})


COMPUTING = [
    unary(f)
    for f in ("relu", "clip", "leaky_relu", "sigmoid", "silu", "gelu", "hardswish", "hardsigmoid", "softmax",
              "avg_pool", "adaptive_avg_pool", "layer_norm", "rms_norm", "group_norm", "batch_norm")
]  # fmt: skip
MOVING = [
    unary(f)
    for f in ("max_pool", "reshape", "transpose", "slice", "split", "expand", "gather", "tile", "pad", "resize", "roll")
]
