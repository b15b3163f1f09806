"""Ops with a weight: convolution and linear, alone or with the activation that their kernels take in."""

from graphq.graph.expert_ops import EXPERTS
from graphq.graph.match import Match
from graphq.graph.recurrent_ops import LSTM

from .base import QuantPattern


def constant_weight(m: Match) -> str | None:
    """Why the weight cannot become codes, or None."""
    return None if m.tensor("weight") is not None else "its weight is computed, not a parameter"


def absorbed_activation(m: Match, head: str) -> str | None:
    """Why an activation is not skipped by the kernel before it, or None."""
    if getattr(m, head).users > 1:
        return f"the {head} feeds something besides the activation"
    if m.activation.family == "clip" and m.activation.arg("min_val") != 0:
        return "its lower bound is not zero"
    return None


class ConvBase(QuantPattern):
    """What all patterns around a convolution share."""

    family, head, weight, bias = "conv", "conv", "weight", "bias"


class Conv(ConvBase):
    """x ─ Q ─ conv ─ Q."""

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.conv(x, weight, bias)

    @staticmethod
    def check(m: Match) -> str | None:
        return constant_weight(m)


class ConvActivation(ConvBase):
    """x ─ Q ─ conv ─ relu | clip ─ Q: the codes after Q cannot leave the bounds, so that the kernel skips the op."""

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.one_of("relu", "clip", name="activation")(op.conv(x, weight, bias))

    @staticmethod
    def check(m: Match) -> str | None:
        return absorbed_activation(m, "conv") or constant_weight(m)


class PaddedConv(ConvBase):
    """x ─ Q ─ pad(0) ─ conv ─ Q: the kernel pads with the code of zero."""

    @staticmethod
    def pattern(op, x, widths, weight, bias):
        return op.conv(op.pad(x, widths), weight, bias)

    @staticmethod
    def check(m: Match) -> str | None:
        return zero_pad(m) or constant_weight(m)


class PaddedConvActivation(ConvBase):
    """x ─ Q ─ pad(0) ─ conv ─ relu | clip ─ Q."""

    @staticmethod
    def pattern(op, x, widths, weight, bias):
        return op.one_of("relu", "clip", name="activation")(op.conv(op.pad(x, widths), weight, bias))

    @staticmethod
    def check(m: Match) -> str | None:
        return zero_pad(m) or absorbed_activation(m, "conv") or constant_weight(m)


def zero_pad(m: Match) -> str | None:
    """Why a pad does not fold into the convolution that follows, or None."""
    mode, value = m.pad.arg("mode") or "constant", m.pad.arg("value")
    if mode != "constant" or value not in (None, 0, 0.0):
        return "only zeros fold into the convolution"
    if m.pad.users > 1:
        return "the padded tensor feeds something besides the convolution"
    spatial = len(m.weight.shape) - 2
    if len(m.widths) > 2 * spatial or any(not isinstance(w, int) or w < 0 for w in m.widths):
        return "it pads batch or channels, crops, or is computed"
    return None


class ConvTranspose(QuantPattern):
    """x ─ Q ─ conv_transpose."""

    family, head, weight, bias, weight_axis = "conv_transpose", "conv_transpose", "weight", "bias", 1

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.conv_transpose(x, weight, bias)


class Linear(QuantPattern):
    """x ─ Q ─ linear."""

    family, head, weight, bias = "linear", "linear", "weight", "bias"

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.linear(x, weight, bias)

    @staticmethod
    def check(m: Match) -> str | None:
        return constant_weight(m)


class LinearActivation(Linear):
    """x [n, in] ─ Q ─ linear ─ relu ─ Q."""

    family = "linear_activation"

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.one_of("relu", "clip", name="activation")(op.linear(x, weight, bias))

    @staticmethod
    def check(m: Match) -> str | None:
        if len(m.x.shape) != 2:
            return "only a matrix product takes the activation in"
        return absorbed_activation(m, "linear") or constant_weight(m)


class Experts(QuantPattern):
    """x ─ Q ─ rows times the weights of their experts."""

    family, head, weight, weight_axis = "experts", "experts", "weight", (0, 1)

    @staticmethod
    def pattern(op, x, weight, offsets):
        return op.aten(EXPERTS, name="experts")(x, weight, offsets)


class Embedding(QuantPattern):
    """indices ─ embedding(table)."""

    family, head, weight, activations = "embedding", "embedding", "weight", ()

    @staticmethod
    def pattern(op, weight, indices):
        return op.embedding(weight, indices)


class Lstm(QuantPattern):
    """x ─ Q ─ one direction of one layer of an LSTM that was taken apart."""

    family, head, weight, more_weights = "lstm", "lstm", "weight", ("recurrent",)

    @staticmethod
    def pattern(op, x, weight, recurrent, bias, h, c):
        return op.aten(LSTM, name="lstm")(x, weight, recurrent, bias, h, c)
