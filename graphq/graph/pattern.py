"""How a pattern is written: as the PyTorch expression that it looks for.

    def pattern(op, x, weight, bias, gamma, beta, mean, var):
        return op.batch_norm(op.conv(x, weight, bias), gamma, beta, mean, var)

`op.<family>` is any op of that family of the op table. Positional arguments follow the op's schema, keyword
arguments name one of it; arguments that the pattern leaves out are free. The parameters of the function are
captures, bound by name; the same name twice means the same tensor twice, and the same expression twice the same
node twice. A capture also matches an argument that is absent (it is None then). Families that commute match with
either order of operands. Numbers match numbers, and tensors without dimensions of that value. A pattern that returns
several expressions has several results. Patterns are made of patterns by calling one function from another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload

from graphq.errors import PassError, did_you_mean
from graphq.graph.optable import COMMUTATIVE, FAMILIES, overloads
from graphq.graph.view import schema_of

SCALED = frozenset({"add", "sub", "rsub"})  # x + alpha · y: a pattern that does not speak of alpha means 1
TOLERANCE = 1e-6  # relative, of numbers


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

    def __rsub__(self, other: Any) -> Expr:
        return OP.rsub(self, other)

    def __neg__(self) -> Expr:
        return OP.aten(torch.ops.aten.neg.default)(self)

    def __pow__(self, other: Any) -> Expr:
        return OP.pow(self, other)

    def __matmul__(self, other: Any) -> Expr:
        return OP.matmul(self, other)


@dataclass(frozen=True)
class Capture(Expr):
    """Anything, bound to a name."""

    name: str


@dataclass(frozen=True, eq=False)
class Call(Expr):
    """A call of one of `targets`. Two Calls are one only if they are the same object: then they match one node."""

    name: str
    targets: frozenset[Any]
    commutes: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    orders: dict[Any, Any] = field(default_factory=dict, repr=False)  # op met → its arguments, kept by the matcher


@dataclass(frozen=True, eq=False)
class Either(Expr):
    """The first of several expressions or constants that matches."""

    options: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Number(Expr):
    """A number within a relative tolerance."""

    value: float
    tolerance: float


@dataclass(frozen=True, eq=False)
class Once(Expr):
    """A result that nothing but this match reads."""

    expr: Expr


@dataclass(frozen=True, eq=False)
class Given(Expr):
    """An argument that is not None."""

    expr: Expr


@dataclass(frozen=True, eq=False)
class Param(Expr):
    """A parameter, buffer or constant of the model."""

    expr: Capture


@dataclass(frozen=True, eq=False)
class Each(Expr):
    """A list whose every member matches; captures inside are bound to the tuple of what they met."""

    expr: Expr
    least: int


@dataclass(frozen=True, eq=False)
class Chain(Expr):
    """A tree of one commutative op, however it is bracketed, with these terms among its leaves, in any order.

    Only a whole tree matches: an op whose result is one more term of the same sum is no root. `rest` takes the other
    leaves; without it there must be none.
    """

    name: str
    targets: frozenset[Any]
    terms: tuple[Any, ...]
    rest: Capture | None


class Ops:
    """The vocabulary of patterns."""

    def __getattr__(self, family: str) -> Callable[..., Expr]:
        if family.startswith("__"):
            raise AttributeError(family)
        return self.one_of(family)

    def one_of(self, *families: str, name: str | None = None) -> Callable[..., Expr]:
        """`op.one_of("relu", "clip")(x)`: a call of any op of these families; the match knows it by `name` (the
        first family)."""
        for family in families:
            if family not in FAMILIES:
                raise PassError(
                    f"unknown op family {family!r} in a pattern",
                    remedy=did_you_mean(family, FAMILIES) + " For an op without a family: op.aten(torch.ops.…)(…).",
                )
        targets = frozenset(t for family in families for t in overloads(family))
        commutes, scaled = set(families) <= COMMUTATIVE, set(families) <= SCALED
        return _caller(name or families[0], targets, commutes, scaled)

    def aten(self, *targets: Any, name: str | None = None) -> Callable[..., Expr]:
        """`op.aten(torch.ops.aten.topk.default)(x, k)`: a call of exactly these ops, yours or torch's."""
        if not targets or not all(isinstance(t, OpOverload) for t in targets):
            raise PassError(
                f"op.aten takes op overloads, not {targets}", remedy="Name the overload: torch.ops.aten.topk.default."
            )
        return _caller(name or targets[0]._schema.name.partition("::")[2], frozenset(targets), False, False)

    def either(self, *options: Any) -> Expr:
        """`op.either(a, b)`: the first of several expressions or constants that matches."""
        return Either(options)

    def once(self, expr: Expr) -> Expr:
        """`op.once(expr)`: a result that nothing else reads. Without it an inner result may be read elsewhere."""
        return Once(expr)

    def given(self, expr: Expr) -> Expr:
        """`op.given(bias)`: an optional argument that is there."""
        return Given(expr)

    def param(self, capture: Capture) -> Expr:
        """`op.param(weight)`: a parameter, buffer or constant, not a computed value."""
        return Param(capture)

    def number(self, value: float, tolerance: float = TOLERANCE) -> Expr:
        """`op.number(0.044715, tolerance=1e-3)`: a number, within a relative tolerance."""
        return Number(value, tolerance)

    def each(self, expr: Expr, least: int = 1) -> Expr:
        """`op.cat(op.each(op.conv(x, w)), 1)`: a list of any length, each member of which matches."""
        return Each(expr, least)

    def chain(self, family: str, *terms: Any, rest: Capture | None = None) -> Expr:
        """`op.chain("add", op.mul(x, w), b, rest=others)`: a sum in any order and bracketing."""
        if family not in COMMUTATIVE:
            raise PassError(f"{family!r} is not commutative", remedy=f"Chains are for {sorted(COMMUTATIVE)}.")
        return Chain(family, frozenset(overloads(family)), terms, rest)


def _caller(name: str, targets: frozenset[Any], commutes: bool, scaled: bool) -> Callable[..., Expr]:
    def build(*args: Any, **kwargs: Any) -> Expr:
        if scaled:
            kwargs.setdefault("alpha", 1)
        if not any(_takes(t, args, kwargs) for t in targets):
            known = sorted({n for t in targets for n in schema_of(t)[0]})
            raise PassError(
                f"op.{name} does not take {len(args)} arguments and {', '.join(kwargs) or 'no keywords'}",
                remedy=f"Its arguments are {', '.join(known)}.",
            )
        return Call(name, targets, commutes, args, kwargs)

    return build


def _takes(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    names, _ = schema_of(target)
    return len(args) <= len(names) and set(kwargs) <= set(names)


OP = Ops()


def children(expr: Any) -> Iterator[Any]:
    """The expressions directly inside an expression."""
    match expr:
        case Call():
            yield from (*expr.args, *expr.kwargs.values())
        case Either():
            yield from expr.options
        case Once() | Given() | Param() | Each():
            yield expr.expr
        case Chain():
            yield from (*expr.terms, *([expr.rest] if expr.rest else []))
        case list() | tuple():
            yield from expr


def walk(expr: Any) -> Iterator[Any]:
    """An expression and everything inside it."""
    yield expr
    for child in children(expr):
        yield from walk(child)


@dataclass(frozen=True)
class Pattern:
    """A compiled pattern: one expression a result, and the ops at which a match can end."""

    outputs: tuple[Expr, ...]
    captures: tuple[str, ...]

    @property
    def expr(self) -> Expr:
        """The first result; where there are more, they are looked for around its match."""
        return self.outputs[0]

    @property
    def roots(self) -> frozenset[Any]:
        return _roots(self.expr)


def _roots(expr: Any) -> frozenset[Any]:
    match expr:
        case Call() | Chain():
            return expr.targets
        case Either():
            return frozenset().union(*(_roots(e) for e in expr.options))
        case Once():
            return _roots(expr.expr)
    raise PassError("a pattern must be an op applied to something", remedy="Return op.<family>(…) from pattern().")


def compile_pattern(function: Callable[..., Any] | Pattern) -> Pattern:
    """Call the pattern function once, with a capture for each of its parameters after `op`."""
    if isinstance(function, Pattern):
        return function
    names = tuple(inspect.signature(function).parameters)[1:]
    returned = function(OP, *map(Capture, names))
    outputs = tuple(returned) if isinstance(returned, (tuple, list)) else (returned,)
    pattern = Pattern(outputs, names)
    for output in outputs:
        _roots(output)
    return pattern


def constant(value: Any) -> float | int | bool | None:
    """The number behind a literal or a tensor of one element; None if it is neither."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 and value.ndim == 0 else None
    return value if isinstance(value, (int, float)) else None
