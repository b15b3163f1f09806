"""Random legal graphs that contain a pattern, generated from the pattern itself.

Inner expressions come first; the recipe of each op then invents the arguments that are still open: shapes, attributes,
parameters or computed tensors, shared inputs. Around the pattern, inner results may be read elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphq.graph.infer import MISFITS
from graphq.graph.optable import family_of
from graphq.graph.pattern import Call, Capture, Chain, Each, Either, Given, Number, Once, Param, Pattern, walk
from graphq.graph.view import schema_of
from graphq.testing.small_graph import SmallGraph

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
# free attributes that have defaults, drawn as often as not; by name where the type does not say what is legal
OTHERWISE: dict[str, tuple[Any, ...]] = {
    "approximate": ("tanh",), "eps": (1e-3, 0.5), "negative_slope": (0.5,), "dtype": (torch.float64, torch.float32),
    "ceil_mode": (True,), "count_include_pad": (False,), "keepdim": (True,), "largest": (False,), "unbiased": (False,),
    "alpha": (2,), "beta": (2,), "dim": (0, -1), "min_val": (0.0,), "max_val": (6.0,), "scale": (0.5, 2.0),
    "is_causal": (True,),
}  # fmt: skip


class Unfit(Exception):
    """This draw leads to no legal graph."""


class Arguments(dict[str, Any]):
    """The arguments of a call by name, as far as they are known; recipes add the others.

    constants: names that the pattern wants as parameters; present: names that must not be None; called: what the
    pattern calls its captures.
    """

    def __init__(self) -> None:
        super().__init__()
        self.constants: set[str] = set()
        self.present: set[str] = set()
        self.called: dict[str, str] = {}


class Generator:
    """One draw. `draw` takes a hypothesis strategy; simple choices come first, so that failures shrink to them."""

    def __init__(self, draw: Callable[[Any], Any], strategies: Any) -> None:
        self._draw, self._st = draw, strategies
        self.bound: dict[str, Any] = {}
        self.made: dict[Call | Chain, Any] = {}
        self.rank = 2

    def graph(self, pattern: Pattern) -> SmallGraph:
        """A graph with the pattern in it. Raises Unfit where the draw does not come out legal."""
        from graphq.testing.recipes import recipe_of

        self.g = SmallGraph(self.choice(DTYPES), dynamic=self.flip())
        calls = [e for output in pattern.outputs for e in walk(output) if isinstance(e, Call)]
        ranks = set(range(1, 6))
        for call in calls:
            ranks &= set(recipe_of(family_of(next(iter(call.targets)))).ranks)
        if not ranks:
            raise Unfit
        self.rank = self.choice(sorted(ranks, key=lambda r: (abs(r - 3), r)))
        roots = [self.make(output) for output in pattern.outputs]
        if not all(isinstance(r, fx.Node) and isinstance(self.g.real[r], torch.Tensor) for r in roots):
            raise Unfit
        inner = [n for n in self.made.values() if n not in roots and isinstance(self.g.real[n], torch.Tensor)]
        self.g.output(*roots, *(n for n in dict.fromkeys(inner) if self.flip()))
        return self.g

    # ---- choices -------------------------------------------------------------------------------------------------

    def choice(self, options: Sequence[Any]) -> Any:
        """One of several, the simplest first."""
        return self._draw(self._st.sampled_from(list(options)))

    def integer(self, low: int, high: int) -> int:
        if high < low:
            raise Unfit
        return int(self._draw(self._st.integers(low, high)))

    def flip(self) -> bool:
        return bool(self._draw(self._st.booleans()))

    def rarely(self) -> bool:
        """True once in a while: for what most rules decline."""
        return self.integer(0, 5) == 5

    # ---- tensors -------------------------------------------------------------------------------------------------

    def shape(self, node: fx.Node) -> list[int]:
        return list(self.g.real[node].shape)

    def base_shape(self) -> list[int]:
        """Of a fresh activation: [batch, features …] of the rank that the pattern's ops agree on."""
        return [self.integer(1, 3) for _ in range(self.rank)]

    def value(self, shape: Sequence[int]) -> fx.Node:
        """An activation; now and then one that is there already."""
        same = [n for n, v in self.g.real.items() if isinstance(v, torch.Tensor) and list(v.shape) == list(shape)]
        same = [n for n in same if n.op == "placeholder"]
        if same and self.flip():
            return self.choice(same)  # type: ignore[no-any-return]
        return self.g.input(*shape, strided=len(shape) > 1 and self.flip(), wide=self.flip())

    def weight(self, shape: Sequence[int], args: Arguments, name: str, *, positive: bool = False) -> fx.Node:
        """A parameter; now and then a tensor that is computed, where the pattern does not forbid it."""
        if name not in args.constants and not positive and self.rarely():
            return self.value(shape)
        return self.g.param(*shape, positive=positive)

    def optional(self, shape: Sequence[int], args: Arguments, name: str) -> fx.Node | None:
        """A parameter or None."""
        return self.weight(shape, args, name) if name in args.present or self.flip() else None

    # ---- expressions ---------------------------------------------------------------------------------------------

    def make(self, expr: Any) -> Any:
        """A node or constant that the expression matches."""
        match expr:
            case Call():
                if expr not in self.made:
                    self.made[expr] = self._call(expr)
                return self.made[expr]
            case Chain():
                if expr not in self.made:
                    self.made[expr] = self._chain(expr)
                return self.made[expr]
            case Either():
                return self.make(self.choice(expr.options))
            case Once():
                return self.make(expr.expr)
            case Number():
                return expr.value
            case Capture():
                if expr.name not in self.bound:
                    self.bound[expr.name] = self.value(self.base_shape())
                return self.bound[expr.name]
            case list() | tuple():
                return [self.make(e) for e in expr]
        return expr

    def _chain(self, expr: Chain) -> fx.Node:
        terms = [self.make(t) for t in expr.terms]
        if expr.rest is not None:
            like = next((t for t in terms if isinstance(t, fx.Node)), None)
            shape = self.shape(like) if like is not None else self.base_shape()
            terms += [self.value(shape) for _ in range(self.integer(0, 2))]
        target = sorted(expr.targets, key=str)[-1]  # the overload for tensors
        while len(terms) > 1:
            a = terms.pop(self.integer(0, len(terms) - 1))
            b = terms.pop(self.integer(0, len(terms) - 1))
            terms.append(self.emit(target, a, b))
        return terms[0]  # type: ignore[no-any-return]

    def _each(self, expr: Each) -> list[Any]:
        """Members of a list; more often than not they read the same inputs, as the branches of a block do."""
        outer, members = dict(self.bound), []
        for number in range(self.integer(max(expr.least, 1), max(expr.least, 1) + 1)):
            inputs = {k: v for k, v in self.bound.items() if isinstance(v, fx.Node) and v.op == "placeholder"}
            self.bound, kept = {**outer, **(inputs if number and not self.rarely() else {})}, dict(self.made)
            members.append(self.make(expr.expr))
            self.made = kept
        return members

    def _call(self, expr: Call) -> fx.Node:
        from graphq.testing.recipes import recipe_of

        targets = sorted(expr.targets, key=str)
        recipe = recipe_of(family_of(targets[0]))
        names, _ = schema_of(targets[0])
        given = dict(zip(names, expr.args, strict=False)) | expr.kwargs
        args, captures = Arguments(), dict[str, Capture]()
        for name, inner in sorted(given.items(), key=lambda item: isinstance(item[1], Capture)):  # they bind captures
            self._known(name, inner, args, captures)
        args.called = {name: capture.name for name, capture in captures.items()}
        target = recipe.fill(self, targets, args)
        self._vary(target, args)
        for name, capture in captures.items():
            self.bound[capture.name] = args.get(name)
        if any(args.get(name) is None for name in args.present):
            raise Unfit
        return self._emit_named(target, args)

    def _vary(self, target: Any, args: Arguments) -> None:
        """Give free attributes other values than their defaults, once in a while."""
        names, defaults = schema_of(target)
        for name in names:
            if name in defaults and name not in args and name in OTHERWISE and self.rarely():
                args[name] = self.choice(OTHERWISE[name])

    def _known(self, name: str, inner: Any, args: Arguments, captures: dict[str, Capture]) -> None:
        """Note what the pattern says of one argument."""
        while isinstance(inner, (Given, Param, Once)):
            if isinstance(inner, Given):
                args.present.add(name)
            if isinstance(inner, Param):
                args.constants.add(name)
            inner = inner.expr
        if isinstance(inner, Each):
            args[name] = self._each(inner)
        elif not isinstance(inner, Capture):
            args[name] = self.make(inner)
        elif inner.name in self.bound:
            args[name] = self.bound[inner.name]
        elif inner in captures.values():  # the same tensor twice in one call
            first = next(k for k, c in captures.items() if c == inner)
            args[name] = args[first] = self.bound[inner.name] = self.value(self.base_shape())
        else:
            captures[name] = inner

    def _emit_named(self, target: Any, args: Arguments) -> fx.Node:
        schema = getattr(target, "_schema", None)
        if schema is None:  # operator.getitem
            return self.emit(target, args["input"], args["index"])
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for a in schema.arguments:
            if a.name in args and not (a.has_default_value() and args[a.name] == a.default_value):
                if a.kwarg_only:
                    keywords[a.name] = args[a.name]
                    continue
                while len(positional) < _position(schema, a.name):
                    positional.append(schema.arguments[len(positional)].default_value)
                positional.append(args[a.name])
        return self.emit(target, *positional, **keywords)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """One op of the graph. Raises Unfit if torch does not take these arguments."""
        try:
            return self.g.call(target, *args, **kwargs)
        except MISFITS as e:
            raise Unfit from e


def _position(schema: Any, name: str) -> int:
    return [a.name for a in schema.arguments].index(name)
