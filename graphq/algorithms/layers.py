"""The layers whose weights an algorithm may choose, as matrices, and their inputs as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphq.algorithms.base import replace_read
from graphq.algorithms.grid import Grid
from graphq.algorithms.rows import matrix_of, patches, spread, weight_of
from graphq.config.spec import QuantSpec
from graphq.graph.decision import Decision, decision_of
from graphq.graph.on_disk import on_disk, values_of
from graphq.graph.view import LayerView, held, parameter
from graphq.numerics.formats import SharedExponents
from graphq.observers.tokens import counted, flattened
from graphq.passes.placement import quantizer_at, quantizer_calls
from graphq.quantizer import TensorQuantizer

CONVS = ("conv", "conv_transpose")
FAMILIES = (*CONVS, "linear", "experts")
ALREADY = "an algorithm before this one has chosen it"


@dataclass
class Layer:
    """A linear, convolution or linear of experts, whose weight is quantized, and nobody else's. call: of the weight's
    quantizer. compensates: the weight that is chosen makes good what the layer's inputs have lost."""

    view: LayerView
    decision: Decision
    call: fx.Node
    quantizer: TensorQuantizer
    compensates: bool = False
    before: tuple[fx.Node, str] | None = None  # weight and reason, while a weight has been chosen

    @property
    def node(self) -> fx.Node:
        return self.view.node

    @property
    def spec(self) -> QuantSpec:
        return self.quantizer.spec

    @property
    def block(self) -> tuple[int, ...]:
        """Of the weight as a matrix."""
        block = self.quantizer.block
        if self.view.family == "conv_transpose":
            return block[1::-1]
        return block[-2:] if self.view.family == "experts" else block[:2]

    @property
    def weight(self) -> Tensor:
        """In its own shape."""
        tensor = parameter(self.view.gm, self.decision.weight)
        assert tensor is not None
        return tensor.detach()

    def matrix(self) -> Tensor:
        """[out, K] in float32."""
        return matrix_of(self.weight, self.view.family).float()

    @property
    def offsets(self) -> fx.Node | None:
        """Where the rows of each expert end."""
        found = self.view.arg("offsets") if self.view.family == "experts" else None
        return found if isinstance(found, fx.Node) else None

    def shape(self) -> tuple[Any, ...]:
        """What decides how inputs become rows: the same for all linears."""
        if self.view.family not in CONVS:
            return (self.offsets,)
        names = ("stride", "padding", "dilation", "output_padding")[: 3 + (self.view.family == "conv_transpose")]
        rank = len(self.shape_of_weight) - 2
        args = (tuple(self.view.arg(name)) for name in names)
        return (tuple(a * rank if len(a) == 1 else a for a in args), self.groups, tuple(self.shape_of_weight[2:]))

    @property
    def groups(self) -> int:
        """Of a convolution's channels."""
        return int(self.view.arg("groups"))

    @property
    def shape_of_weight(self) -> torch.Size:
        return self._held().shape

    @property
    def is_on_disk(self) -> bool:
        return on_disk(self._held())

    @property
    def parameter_name(self) -> str:
        """In the model, until a weight has been chosen."""
        assert self.decision.weight is not None
        return str(self.decision.weight.target)

    def settle(self, chosen: Tensor, grid: Grid, name: str, note: str) -> None:
        """Take this weight [out, K], which is on the grid; ranges are not observed any more."""
        self.settle_on(self.shaped(chosen).to(self._held().dtype), grid.scale, grid.zero, grid.overall, name, note)

    def shaped(self, matrix: Tensor) -> Tensor:
        """A matrix [out, K] in the shape of the weight."""
        return weight_of(matrix, self.shape_of_weight, self.view.family)

    def settle_on(
        self, weight: Tensor, scale: Tensor, zero: Tensor, overall: Tensor | None, name: str, note: str
    ) -> None:
        """Take this weight in its own shape, with scale and zero point of it as a matrix; each may be on disk."""
        read, rank = self.decision.weight, len(self.quantizer.block)
        assert read is not None
        self.before = (read, self.decision.reason)
        self.decision.original = None if self.compensates else self._held()
        self.decision.weight = replace_read(self.view.gm, read, self.call, weight, name)
        self.decision.reason += f"; {note}"
        if rank > 2:
            shapes = {"experts": [*self.shape_of_weight[:2], -1], "conv_transpose": [1, -1, *[1] * (rank - 2)]}
            grid = shapes.get(self.view.family, [*scale.shape, *[1] * (rank - 2)])
            scale, zero = (values_of(t).reshape(grid) for t in (scale, zero))
        self.quantizer.settle_on(scale, zero, overall)

    def _held(self) -> Tensor:
        tensor = held(self.view.gm, self.decision.weight)
        assert tensor is not None
        return tensor

    def unsettle(self) -> None:
        """Take that back."""
        if self.before is None or self.decision.weight is None:
            return
        read, self.decision.reason = self.before
        self.call.replace_input_with(self.decision.weight, read)
        self.decision.weight, self.decision.original, self.before = read, None, None
        self.quantizer.settle_on(None)


def by_input(gm: fx.GraphModule) -> tuple[dict[fx.Node, list[Layer]], dict[fx.Node, str]]:
    """(layers by the float tensor that they read, in the order of the graph; other ops with quantized weights, and why
    these are left alone)."""
    found: dict[fx.Node, list[Layer]] = {}
    others: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if decision is None or decision.weight_spec is None or decision.weight is None:
            continue
        layer = _layer(LayerView(gm, node), decision)
        if isinstance(layer, Layer):
            found.setdefault(_source(node), []).append(layer)
        else:
            others[node] = layer
    place = {n: i for i, n in enumerate(gm.graph.nodes)}
    return dict(sorted(found.items(), key=lambda item: place[item[0]])), others


def names_of(others: dict[fx.Node, str]) -> dict[str, str]:
    """Why weights are left alone, by their names in the model."""
    weights = ((decision_of(node), why) for node, why in others.items())
    return {str(d.weight.target): why for d, why in weights if d is not None and d.weight is not None}


def _layer(view: LayerView, decision: Decision) -> Layer | str:
    """The layer, or why its weight cannot be chosen."""
    _, call = quantizer_calls(decision)
    if view.family == "embedding":
        return "rows of a table are not summed, and no value can make good what another loses"
    if view.family not in FAMILIES or call is None:
        return f"the weight of {view.family} has no products to look at"
    if len(call.users) > 1 or len(decision.weight.users) > 1:  # type: ignore[union-attr]
        return "others read this weight too, and what is good for one is not for all"
    quantizer, spec = quantizer_at(view.gm, call), quantizer_at(view.gm, call).spec
    if quantizer.settled:
        return ALREADY
    if spec.then is not None:
        return "it is quantized twice"
    if isinstance(spec.number_format, SharedExponents):
        return f"{spec.format} shares exponents between columns"
    if view.family == "conv_transpose" and int(view.arg("groups")) > 1:
        return "the groups of a transposed convolution share scales"
    if spec.granularity in ("group", "block") and (view.family in CONVS or spec.axis not in (None, 1, -1)):
        return "its groups do not run along the inputs"
    if view.family == "experts" and (spec.axis is not None or spec.granularity == "block"):
        return "its blocks are not those of rows"
    if spec.granularity == "channel" and quantizer.block[int(view.family == "conv_transpose")] != 1:
        return "its scales are those of input channels"
    if _source(view.node).op == "get_attr":
        return "its input is a parameter"
    return Layer(view, decision, call, quantizer)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    while source.op == "call_module" and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return source


def input_rows(layer: Layer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What rows of the matrix are multiplied with, [groups, rows, K / groups]; tokens that do not count left out. Not
    of experts, which have rows of their own."""
    if layer.view.family == "linear":
        flat = mask is not None and flattened(_source(layer.node))
        return counted(x, mask.reshape(-1) if flat else mask).float()[None]  # type: ignore[union-attr]
    args, groups, _ = layer.shape()
    rows = (patches if layer.view.family == "conv" else spread)(x.float(), layer.weight, *args)
    return torch.stack([part.flatten(1) for part in rows.chunk(groups, -1)])
