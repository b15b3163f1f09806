"""How to invent the arguments of an op: one recipe a family.

A recipe gets the arguments that are known already and fills in the rest, so that the call is legal; it returns the
overload to call. `ranks` are those of the op's first tensor. A package with ops of its own adds recipes for them:

    @recipe("swiglu", ranks=(2, 3))
    def swiglu(g, targets, a):
        x = a.setdefault("x", g.value(g.base_shape()))
        …
        return targets[0]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch

from graphq.graph.view import schema_of
from graphq.testing.generate import Arguments, Generator, Unfit

Fill = Callable[[Generator, list[Any], Arguments], Any]


@dataclass(frozen=True)
class Recipe:
    """fill(generator, overloads, arguments) → the overload to call."""

    fill: Fill
    ranks: tuple[int, ...]


_RECIPES: dict[str, Recipe] = {}


def recipe(*families: str, ranks: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Callable[[Fill], Fill]:
    """Register the recipe of some families of the op table (or of ops by their names)."""

    def add(fill: Fill) -> Fill:
        _RECIPES.update(dict.fromkeys(families, Recipe(fill, ranks)))
        return fill

    return add


def recipe_of(family: str) -> Recipe:
    """The recipe of a family; ops without one are taken for functions of one tensor."""
    return _RECIPES.get(family, Recipe(unary, (1, 2, 3, 4, 5)))


def unary(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = g.choice(targets)
    x = _first(g, target, a)
    schema = getattr(target, "_schema", None)
    for argument in schema.arguments if schema is not None else ():
        if argument.name not in a and not argument.has_default_value() and str(argument.type) == "Tensor":
            a[argument.name] = g.value(g.shape(x))
    return target


def _first(g: Generator, target: Any, a: Arguments) -> Any:
    """The op's first tensor, invented where it is open."""
    name = schema_of(target)[0][0]
    if name not in a:
        a[name] = g.value(g.base_shape())
    return a[name]


def _dim(g: Generator, rank: int) -> int:
    return g.integer(0, rank - 1) - (rank if g.flip() else 0)


@recipe("add", "sub", "mul", "div", "rsub", "pow")
def elementwise(g: Generator, targets: list[Any], a: Arguments) -> Any:
    if "self" not in a and "other" not in a:
        a["self"] = g.value(g.base_shape())
    known, open_ = ("self", "other") if "self" in a else ("other", "self")
    if open_ not in a and isinstance(a[known], torch.fx.Node):
        a[open_] = _operand(g, g.shape(a[known]), a, open_)
    elif open_ not in a:
        a[open_] = g.value(g.base_shape())
    if not isinstance(a["self"], torch.fx.Node):  # x + 1 and 1 + x are one in a graph
        a["self"], a["other"] = a["other"], a["self"]
    names = {str(t).rpartition(".")[2]: t for t in targets}
    tensor = isinstance(a["other"], torch.fx.Node)
    wanted = ("Tensor", "Tensor_Tensor") if tensor else ("Tensor_Scalar", "Tensor", "Scalar")
    fitting = [n for n in wanted if n in names]
    if not fitting:
        raise Unfit
    return names[fitting[0] if tensor or fitting[0] == "Tensor_Scalar" else g.choice(fitting)]


KINDS = ("vector", "same", "number", "scalar", "column", "channel", "wider")
# what authors mean by the names that they give to captures; other kinds are drawn too
USUAL = dict.fromkeys(("eps", "epsilon", "factor"), "number") | dict.fromkeys(
    ("weight", "bias", "gamma", "beta", "scale"), "vector"
)


def _operand(g: Generator, shape: list[int], a: Arguments, name: str) -> Any:
    """The other operand: a tensor of the same shape, or one that is broadcast, or a number."""
    usual = USUAL.get(a.called.get(name, ""))
    kind = g.choice([*([usual] * 2 * len(KINDS) if usual else []), *KINDS])
    if kind == "number":
        return g.choice([0.5, 2.0, 3])
    if kind == "same" or not shape:
        return g.value(shape)
    if kind == "wider":
        return g.value([2, *shape])
    shapes = {
        "vector": shape[-1:],
        "scalar": [],
        "column": [*shape[:-1], 1],
        "channel": [shape[0], *[1] * (len(shape) - 1)],
    }
    return g.weight(shapes[kind], a, name)


@recipe("conv", "conv_padding", "conv_transpose", ranks=(3, 4, 5))
def conv(g: Generator, targets: list[Any], a: Arguments) -> Any:
    groups = a.setdefault("groups", g.choice([1, 2]))
    if "input" not in a:
        spatial = [g.integer(2, 4) for _ in range(g.rank - 2)]
        a["input"] = g.value([g.integer(1, 3), groups * g.integer(1, 2), *spatial])
    _, channels, *sizes = g.shape(a["input"])
    target = next((t for t in targets if f"{len(sizes)}d" in str(t)), None)
    if target is None or channels % groups or not channels:
        raise Unfit
    kernel = [g.integer(1, min(3, s)) for s in sizes]
    out = g.integer(1, 2)
    transposed = "transpose" in str(target)
    shape = [channels, out] if transposed else [out * groups, channels // groups]
    if "weight" not in a:
        a["weight"] = g.weight([*shape, *kernel], a, "weight")
    if "bias" not in a:
        a["bias"] = g.optional([out * groups], a, "bias")
    if "padding" in str(target).partition(".")[2]:
        a.setdefault("padding", g.choice(["same", "valid"]))
    else:
        a.setdefault("stride", [g.choice([1, 2]) for _ in sizes])
        a.setdefault("padding", [g.choice([0, 1]) for _ in sizes])
        if not transposed:
            a.setdefault("dilation", [g.choice([1, 2]) for _ in sizes])
    return target


@recipe("linear", ranks=(1, 2, 3))
def linear(g: Generator, targets: list[Any], a: Arguments) -> Any:
    x, out = _first(g, targets[0], a), g.integer(1, 3)
    if "weight" not in a:
        a["weight"] = g.weight([out, g.shape(x)[-1]], a, "weight")
    if "bias" not in a:
        a["bias"] = g.optional([g.shape(a["weight"])[0]], a, "bias")
    return targets[0]


@recipe("addmm", ranks=(2,))
def addmm(g: Generator, targets: list[Any], a: Arguments) -> Any:
    if "mat1" not in a:
        a["mat1"] = g.value(g.base_shape())
    rows, inner = g.shape(a["mat1"])
    if "mat2" not in a:
        a["mat2"] = _matrix(g, inner, g.integer(1, 3), a, "mat2")
    out = g.shape(a["mat2"])[-1]
    if "self" not in a:
        a["self"] = g.weight(g.choice([[out], [rows, out], [1]]), a, "self")
    for factor in ("alpha", "beta"):
        if factor not in a and g.rarely():
            a[factor] = 2
    return targets[0]


def _matrix(g: Generator, inner: int, out: int, a: Arguments, name: str) -> Any:
    """[inner, out]: a parameter, or the transpose of one."""
    if g.flip():
        return g.weight([inner, out], a, name)
    return g.emit(torch.ops.aten.t.default, g.g.param(out, inner))


@recipe("matmul", ranks=(2, 3))
def matmul(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = next(t for t in targets if "matmul" in str(t))
    x = _first(g, target, a)
    if "other" not in a:
        a["other"] = _matrix(g, g.shape(x)[-1], g.integer(1, 3), a, "other")
    return target


@recipe("batch_norm", "native_batch_norm", ranks=(2, 3, 4, 5))
def batch_norm(g: Generator, targets: list[Any], a: Arguments) -> Any:
    x = _first(g, targets[0], a)
    if len(g.shape(x)) < 2:
        raise Unfit
    channels = g.shape(x)[1:2]
    for name in ("weight", "bias"):
        if name not in a:
            a[name] = g.optional(channels, a, name)
    for name in ("running_mean", "running_var"):
        if name not in a:
            a[name] = g.weight(channels, a, name, positive=name == "running_var")
    a.setdefault("training", False)
    a.setdefault("momentum", 0.1)
    a.setdefault("eps", g.choice([1e-5, 1e-3]))
    a.setdefault("cudnn_enabled", False)
    return targets[0]


@recipe("layer_norm", "rms_norm")
def norm(g: Generator, targets: list[Any], a: Arguments) -> Any:
    last = g.shape(_first(g, targets[0], a))[-1:]
    a.setdefault("normalized_shape", last)
    for name in ("weight", "bias"):
        if name not in a and name in schema_of(targets[0])[0]:
            a[name] = g.optional(last, a, name)
    return targets[0]


@recipe("group_norm", ranks=(2, 3, 4))
def group_norm(g: Generator, targets: list[Any], a: Arguments) -> Any:
    channels = g.shape(_first(g, targets[0], a))[1:2]
    a.setdefault("num_groups", g.choice([d for d in (1, 2, 3) if channels[0] % d == 0]))
    for name in ("weight", "bias"):
        if name not in a:
            a[name] = g.optional(channels, a, name)
    return targets[0]


@recipe("softmax")
def softmax(g: Generator, targets: list[Any], a: Arguments) -> Any:
    rank = len(g.shape(_first(g, targets[0], a)))
    a.setdefault("dim", _dim(g, rank))
    a.setdefault("half_to_float", False)
    return g.choice(targets)


@recipe("mean", "sum", "amax")
def reduction(g: Generator, targets: list[Any], a: Arguments) -> Any:
    rank = len(g.shape(_first(g, targets[0], a)))
    if "dim" not in a:
        one = [_dim(g, rank)]
        a["dim"] = g.choice(
            [
                [-1],
                one,
                list(range(1, rank)) or one,
                list(range(2, rank)) or one,
                [rank - 2, rank - 1] if rank > 1 else one,
            ]
        )
    a.setdefault("keepdim", g.choice([True, False]))
    return targets[0]


@recipe("clip")
def clip(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = g.choice(targets)
    _first(g, target, a)
    low, high = g.choice([0.0, -1.0, 0]), g.choice([None, 6.0, 0.5, float("inf")])
    names = schema_of(target)[0]
    if "min" in names and "min" not in a:
        a["min"] = low if "max" not in names or high is None else g.choice([low, None])
    if "max" in names and "max" not in a:
        a["max"] = high
    if "max_val" in names:
        a.setdefault("min_val", low)
        a.setdefault("max_val", 6.0 if high is None else high)
    return target


@recipe("sqrt", "rsqrt")
def root(g: Generator, targets: list[Any], a: Arguments) -> Any:
    if "self" not in a:
        x = g.value(g.base_shape())
        a["self"] = x if g.rarely() else g.emit(torch.ops.aten.exp.default, x)
    return targets[0]


@recipe("cat")
def cat(g: Generator, targets: list[Any], a: Arguments) -> Any:
    if "tensors" not in a:
        shape = g.base_shape()
        a["tensors"] = [g.value(shape) for _ in range(g.integer(1, 3))]
    a.setdefault("dim", _dim(g, len(g.shape(a["tensors"][0]))))
    return targets[0]


@recipe("split", ranks=(2, 3, 4))
def split(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = g.choice(targets)
    x = _first(g, target, a)
    size = g.shape(x)[a.setdefault("dim", _dim(g, len(g.shape(x))))]
    names = schema_of(target)[0]
    if "split_sizes" in names:
        first = g.integer(0, size)
        a.setdefault("split_sizes", [first, size - first])
    elif "split_size" in names:
        a.setdefault("split_size", g.integer(1, size))
    elif "chunks" in names:
        a.setdefault("chunks", g.integer(1, 2))
    open_ = a.pop("split_size", None) if "split_size" not in names else None  # bound under the first overload's name
    if open_ is not None:
        a[names[1]] = open_
    a.setdefault("split_size", a.get(names[1]))
    return target


@recipe("getitem")
def getitem(g: Generator, targets: list[Any], a: Arguments) -> Any:
    a.setdefault("index", g.integer(0, len(g.g.real[a["input"]]) - 1))
    return targets[0]


@recipe("reshape")
def reshape(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = g.choice(targets)
    shape = g.shape(_first(g, target, a))
    rank, names = len(shape), schema_of(target)[0]
    for name in ("size", "shape"):
        if name in names:
            a.setdefault(name, g.choice([[-1, *shape[1:]], [shape[0], -1], [-1], shape]))
    if "sizes" in names:
        a["dim"], a["sizes"] = rank - 1, g.choice([[shape[-1]], [1, shape[-1]], [-1, 1]])
    elif "dim" in names:
        a.setdefault("dim", [_dim(g, rank)] if "dims" in str(target) else _dim(g, rank))
    if "start_dim" in names:
        a.setdefault("start_dim", g.integer(0, rank - 1))
    return target


@recipe("transpose", ranks=(2, 3, 4))
def transpose(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = g.choice(targets)
    rank, names = len(g.shape(_first(g, target, a))), schema_of(target)[0]
    for name in names[1:]:
        if name not in a:
            a[name] = list(g.choice(list(permutations(range(rank))))) if name == "dims" else _dim(g, rank)
    return target


@recipe("slice")
def slice_(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = g.choice(targets)
    shape = g.shape(_first(g, target, a))
    dim = a.setdefault("dim", _dim(g, len(shape)))
    for name in schema_of(target)[0][1:]:
        if name in ("start", "index"):
            a.setdefault(name, g.integer(0, shape[dim] - 1))
        if name == "end":
            a.setdefault(name, g.choice([2**63 - 1, shape[dim]]))
        if name == "step":
            a.setdefault(name, g.choice([1, 2]))
        if name == "length":
            a.setdefault(name, 1)
    return target


@recipe("expand")
def expand(g: Generator, targets: list[Any], a: Arguments) -> Any:
    shape = g.shape(_first(g, targets[0], a))
    a.setdefault("size", g.choice([shape, [-1] * len(shape), [2, *shape]]))
    return targets[0]


@recipe("pad", ranks=(3, 4, 5))
def pad(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = g.choice(targets)
    rank = len(g.shape(_first(g, target, a)))
    sides = [g.choice([0, 1]) for _ in range(g.integer(1, rank - 1))]
    widths = [w for s in sides for w in (s, s)]
    a.setdefault("pad", [*widths[:-1], g.choice([widths[-1], widths[-1], 1, -1])])
    if "mode" in schema_of(target)[0] and g.rarely():
        a["mode"] = "reflect"
    elif g.rarely():
        a["value"] = 1.0
    return target


@recipe("dropout")
def dropout(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = next(t for t in targets if "native" not in str(t))
    _first(g, target, a)
    a.setdefault("p", 0.5)
    a.setdefault("train", g.rarely())
    return target


@recipe("cast")
def cast(g: Generator, targets: list[Any], a: Arguments) -> Any:
    target = g.choice(
        [t for t in targets if str(t) in ("aten.to.dtype", "aten._to_copy.default", "aten.type_as.default")]
    )
    x = _first(g, target, a)
    if "other" in schema_of(target)[0]:
        a["other"] = g.value(g.shape(x))
    else:
        a["dtype"] = g.choice([g.g.dtype, torch.float64, torch.float32])
    return target


@recipe("avg_pool", "max_pool", ranks=(3, 4, 5))
def pool(g: Generator, targets: list[Any], a: Arguments) -> Any:
    if "self" not in a:
        a["self"] = g.value([g.integer(1, 3), g.integer(1, 3), *(g.integer(2, 4) for _ in range(g.rank - 2))])
    sizes = g.shape(a["self"])[2:]
    a.setdefault("kernel_size", [g.integer(1, 2) for _ in sizes])
    return _of_rank(targets, len(sizes))


@recipe("adaptive_avg_pool", ranks=(3, 4, 5))
def adaptive_pool(g: Generator, targets: list[Any], a: Arguments) -> Any:
    sizes = g.shape(_first(g, targets[0], a))[2:]
    a.setdefault("output_size", [1] * len(sizes))
    return _of_rank(targets, len(sizes))


def _of_rank(targets: list[Any], spatial: int) -> Any:
    found = next((t for t in targets if f"{spatial}d" in str(t)), None)
    if found is None:
        raise Unfit
    return found


@recipe("attention", ranks=(3, 4))
def attention(g: Generator, targets: list[Any], a: Arguments) -> Any:
    shape = g.shape(_first(g, targets[0], a))
    for name in ("key", "value"):
        if name not in a:
            a[name] = g.value(shape)
    return targets[0]


@recipe("roll")
def roll(g: Generator, targets: list[Any], a: Arguments) -> Any:
    rank = len(g.shape(_first(g, targets[0], a)))
    a.setdefault("shifts", [g.integer(-1, 1)])
    a.setdefault("dims", [_dim(g, rank)])
    return targets[0]
