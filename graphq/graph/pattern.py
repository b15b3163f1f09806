"""How a pattern is written: as the PyTorch expression that it looks for.

    def pattern(op, x, weight, bias, gamma, beta, mean, var):
        return op.batch_norm(op.conv(x, weight, bias), gamma, beta, mean, var)

`op.<family>` is any op of that family of the op table. Positional arguments follow the op's schema, keyword
arguments name one of it; arguments that the pattern leaves out are free. The parameters of the function are
captures, bound by name; the same name twice means the same tensor twice. A capture also matches an argument that
is absent (it is None then). Families that commute match with either order of operands. Numbers match numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch._ops import OpOverload

from graphq.errors import PassError, did_you_mean
from graphq.graph.optable import COMMUTATIVE, FAMILIES, overloads

SCALED = frozenset({"add", "sub"})  # x + alpha · y: a pattern that does not speak of alpha means 1


class Expr:
    """A piece of a pattern; the arithmetic operators of Python build larger ones."""

    def __add__(self, other: Any) -> Expr:
        return OP.add(self, other)

    def __radd__(self, other: Any) -> Expr:
        return OP.add(self, other)

    def __mul__(self, other: Any) -> Expr:
        return OP.mul(self, other)

    def __rmul__(self, other: Any) -> Expr:
        return OP.mul(self, other)

    def __sub__(self, other: Any) -> Expr:
        return OP.sub(self, other)

    def __truediv__(self, other: Any) -> Expr:
        return OP.div(self, other)


@dataclass(frozen=True)
class Capture(Expr):
    """Anything, bound to a name."""

    name: str


@dataclass(frozen=True)
class Either(Expr):
    """The first of several expressions that matches."""

    options: tuple[Expr, ...]


@dataclass(frozen=True)
class Call(Expr):
    """A call of one of `targets`."""

    name: str
    targets: frozenset[OpOverload]
    commutes: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


class Ops:
    """The vocabulary of patterns: `op.conv(…)`, `op.one_of("relu", "clip")(…)`, `op.either(a, b)`."""

    def __getattr__(self, family: str) -> Callable[..., Expr]:
        return self.one_of(family)

    def one_of(self, *families: str, name: str | None = None) -> Callable[..., Expr]:
        """A call of any op of these families; the match knows it by `name` (the first family)."""
        for family in families:
            if family not in FAMILIES:
                raise PassError(f"unknown op family {family!r} in a pattern", remedy=did_you_mean(family, FAMILIES))
        targets = frozenset(t for family in families for t in overloads(family))

        def build(*args: Any, **kwargs: Any) -> Expr:
            if set(families) <= SCALED:
                kwargs.setdefault("alpha", 1)
            return Call(name or families[0], targets, set(families) <= COMMUTATIVE, args, kwargs)

        return build

    def either(self, *options: Expr) -> Expr:
        return Either(options)


OP = Ops()


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern: its expression, and the ops at which a match can end."""

    expr: Expr
    captures: tuple[str, ...]

    @property
    def roots(self) -> frozenset[OpOverload]:
        return _roots(self.expr)


def _roots(expr: Expr) -> frozenset[OpOverload]:
    if isinstance(expr, Call):
        return expr.targets
    if isinstance(expr, Either):
        return frozenset().union(*(_roots(e) for e in expr.options))
    raise PassError("a pattern must be an op applied to something", remedy="Return op.<family>(…) from pattern().")


def compile_pattern(function: Callable[..., Expr]) -> Pattern:
    """Call the pattern function once, with a capture for each of its parameters after `op`."""
    names = tuple(inspect.signature(function).parameters)[1:]
    return Pattern(function(OP, *map(Capture, names)), names)
