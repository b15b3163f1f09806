"""An estimate of what every op costs: where it is worth looking, not a measurement.

Products cost their multiplications, everything else the bytes that it reads and writes; integers are half of the former
and a quarter of the latter. Sizes are those of the example inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from graphq.graph.decision import decision_of
from graphq.graph.optable import family_of
from graphq.graph.view import value_of

MULTIPLICATIONS, BYTES = 50e9, 10e9  # in a second, of float32 on one or two cores; only their ratio matters
PRODUCTS = ("conv", "conv_transpose", "linear", "matmul", "attention")
FREE = ("reshape", "transpose", "slice", "expand", "getitem", "split")


def shares(nodes: Iterable[fx.Node]) -> dict[fx.Node, float]:
    """node → its part of the estimated time of all, 0 to 1."""
    times = {n: _seconds(n) for n in nodes}
    total = sum(times.values()) or 1.0
    return {n: t / total for n, t in times.items()}


def _seconds(node: fx.Node) -> float:
    decision, family = decision_of(node), family_of(node.target)
    if decision is None or decision.action == "skip" or family in FREE:
        return 0.0
    integer = decision.action in ("quantize", "carry", "fuse")
    if family in PRODUCTS:
        return _multiplications(node, family) / MULTIPLICATIONS / (2 if integer else 1)
    if decision.action == "fuse":
        return 0.0
    moved = sum(_elements(value_of(n)) for n in (node, *node.all_input_nodes))
    return moved * (1 if integer else 4) / BYTES


def _multiplications(node: fx.Node, family: str) -> float:
    result = _elements(value_of(node))
    operands = [value_of(n) for n in node.args[:2] if isinstance(n, fx.Node)]
    shapes = [[_size(d) for d in v.shape] for v in operands if isinstance(v, Tensor)]
    if len(shapes) < 2:
        return result
    if family == "attention":  # scores and their product with the values
        return 2 * math.prod(shapes[0]) * shapes[1][-2]
    if family == "conv_transpose":
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if family == "matmul":
        return result * shapes[0][-1]
    return result * math.prod(shapes[1][1:])  # linear: in; conv: in / groups · kernel


def _elements(value: object) -> float:
    if isinstance(value, (list, tuple)):
        return sum(_elements(v) for v in value)
    return float(math.prod(_size(d) for d in value.shape)) if isinstance(value, Tensor) else 0.0


def _size(dimension: int | torch.SymInt) -> int:
    """A size; of a dynamic one that of the example."""
    if isinstance(dimension, int):
        return dimension
    hint = dimension.node.hint
    return int(hint) if hint is not None else 1
