"""One form for clipping: relu for [0, ∞), hardtanh for every other pair of bounds."""

import torch

from graphq.graph.match import Match
from graphq.graph.passes import Rewrite

aten = torch.ops.aten


class Relu6(Rewrite):
    """relu6(x)  ⇒  hardtanh(x, 0, 6)."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.clip(x)

    @staticmethod
    def check(m: Match) -> str | None:
        return m.not_float("x") if m.root.op == "aten.relu6.default" else "not relu6"

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.hardtanh.default, m.x, 0.0, 6.0)


class Clamp(Rewrite):
    """clamp(x, low, high)  ⇒  hardtanh(x, low, high), both bounds numbers."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.clip(x)

    @staticmethod
    def check(m: Match) -> str | None:
        if m.root.op != "aten.clamp.default":
            return "not clamp"
        bounds = m.root.arg("min"), m.root.arg("max")
        return m.not_float("x") if all(isinstance(b, int | float) for b in bounds) else "a bound is missing or computed"

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.hardtanh.default, m.x, float(m.root.arg("min")), float(m.root.arg("max")))


class ClampMin(Rewrite):
    """clamp(x, min=0), clamp_min(x, 0)  ⇒  relu(x)."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.clip(x)

    @staticmethod
    def check(m: Match) -> str | None:
        if m.root.op not in ("aten.clamp.default", "aten.clamp_min.default"):
            return "not a clamp"
        return m.not_float("x") if m.root.arg("min") == 0 and m.root.arg("max") is None else "not the bounds [0, ∞)"

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.relu.default, m.x)


class ClipFromZero(Rewrite):
    """hardtanh(x, 0, ∞)  ⇒  relu(x)."""

    equivalence = "exact"

    @staticmethod
    def pattern(op, x):
        return op.clip(x)

    @staticmethod
    def check(m: Match) -> str | None:
        is_relu = m.root.op == "aten.hardtanh.default" and m.root.arg("min_val") == 0
        return m.not_float("x") if is_relu and m.root.arg("max_val") == float("inf") else "not the bounds [0, ∞)"

    @staticmethod
    def rewrite(m: Match):
        return m.call(aten.relu.default, m.x)
