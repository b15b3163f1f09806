"""What a quantization pattern says: which ops are computed together, and which of its captures are activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from graphq.graph.match import Match
from graphq.graph.pattern import Expr


class QuantPattern:
    """Ops that one kernel computes. `pattern` finds them; `check` says why not, or None.

    family: the row of the target's kernel table. head: the op that does the work; the others are fused into it.
    activations: captures that carry activations (a list capture stands for all its members).
    cached: those of them that a cache keeps.
    weight, bias: captures of the parameters. weight_axis: the axis of the weight's output channels,
        or the axes.
    more_weights: captures of further weights, quantized as the weight is.
    """

    pattern: ClassVar[Callable[..., Expr]]
    family: ClassVar[str]
    head: ClassVar[str]
    activations: ClassVar[tuple[str, ...]] = ("x",)
    cached: ClassVar[tuple[str, ...]] = ()
    weight: ClassVar[str | None] = None
    bias: ClassVar[str | None] = None
    weight_axis: ClassVar[int | tuple[int, ...]] = 0
    more_weights: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def check(m: Match) -> str | None:
        return None
