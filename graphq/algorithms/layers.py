"""The layers whose weights an algorithm may choose, as matrices, and their inputs as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphq.algorithms.base import replace_read
from graphq.config.spec import QuantSpec
from graphq.graph.decision import Decision, decision_of
from graphq.graph.integer_ops import columns
from graphq.graph.view import LayerView, parameter
from graphq.numerics.pairs import along_k, from_k
from graphq.passes.placement import quantizer_at, quantizer_calls
from graphq.quantizer import TensorQuantizer

FAMILIES = ("conv", "linear")


@dataclass
class Layer:
    """A linear or convolution whose weight is quantized, and nobody else's. call: of the weight's quantizer."""

    view: LayerView
    decision: Decision
    call: fx.Node
    quantizer: TensorQuantizer

    @property
    def node(self) -> fx.Node:
        return self.view.node

    @property
    def spec(self) -> QuantSpec:
        return self.quantizer.spec

    @property
    def block(self) -> tuple[int, ...]:
        """Of the weight as a matrix."""
        return self.quantizer.block[:2]

    @property
    def weight(self) -> Tensor:
        """[out, in] or [out, in / groups, …]."""
        tensor = parameter(self.view.gm, self.decision.weight)
        assert tensor is not None
        return tensor.detach()

    def matrix(self) -> Tensor:
        """[out, K] in float32; of a convolution in the order of kernel positions, then channels."""
        return along_k(self.weight).float() if self.view.family == "conv" else self.weight.float()

    def shape(self) -> tuple[Any, ...]:
        """What decides how inputs become rows: the same for all linears."""
        if self.view.family == "linear":
            return ()
        args = (self.view.arg(k) for k in ("stride", "padding", "dilation"))
        return (*(tuple(a) for a in args), int(self.view.arg("groups")), tuple(self.weight.shape[2:]))

    def settle(self, chosen: Tensor, scale: Tensor, zero: Tensor, name: str, note: str) -> None:
        """Take this weight [out, K], which is on the grid of these scales; ranges are not observed any more."""
        old, gm = self.weight, self.view.gm
        tensor = from_k(chosen, old.shape) if self.view.family == "conv" else chosen
        assert self.decision.weight is not None
        self.decision.weight = replace_read(gm, self.decision.weight, self.call, tensor.to(old.dtype), name)
        self.decision.reason += f"; {note}"
        rank = len(self.quantizer.block)
        self.quantizer.settle_on(*(t.reshape(*t.shape, *[1] * (rank - 2)) if rank > 2 else t for t in (scale, zero)))


def by_input(gm: fx.GraphModule) -> dict[fx.Node, list[Layer]]:
    """Layers by the float tensor that they read, in the order of the graph."""
    found: dict[fx.Node, list[Layer]] = {}
    for node in gm.graph.nodes:
        layer = _layer(gm, node)
        if layer is not None:
            found.setdefault(_source(gm, node), []).append(layer)
    place = {n: i for i, n in enumerate(gm.graph.nodes)}
    return dict(sorted(found.items(), key=lambda item: place[item[0]]))


def _layer(gm: fx.GraphModule, node: fx.Node) -> Layer | None:
    decision, view = decision_of(node), LayerView(gm, node)
    if decision is None or decision.weight_spec is None or view.family not in FAMILIES:
        return None
    _, call = quantizer_calls(decision)
    if call is None or len(call.users) > 1 or decision.weight is None or len(decision.weight.users) > 1:
        return None  # a tied weight: what is good for one reader is not for the other
    quantizer = quantizer_at(gm, call)
    spec = quantizer.spec
    by_columns = view.family == "linear" and spec.axis in (None, 1, -1)
    fits = spec.granularity in ("tensor", "channel") or (spec.granularity in ("group", "block") and by_columns)
    if not fits or spec.then is not None or spec.ragged or quantizer.settled:
        return None
    if spec.granularity == "channel" and quantizer.block[0] != 1:
        return None
    return Layer(view, decision, call, quantizer)


def _source(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    while source.op == "call_module" and isinstance(source.args[0], fx.Node):
        source = source.args[0]
    return source


def input_rows(layer: Layer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """What rows of the matrix are multiplied with, [groups, rows, K / groups]; tokens that do not count left out."""
    if layer.view.family == "linear":
        counted = mask is not None and x.shape[:-1] == mask.shape
        return (x[mask] if counted else x.reshape(-1, x.shape[-1])).float()[None]
    stride, padding, dilation, groups, _ = layer.shape()
    weight = layer.weight
    batched = x if x.ndim == weight.ndim else x[None]
    parts = columns(batched.float(), weight, stride, padding, dilation).chunk(groups, -1)
    spatial = weight.ndim - 2
    return torch.stack([p.flatten(1 + spatial).flatten(0, spatial) for p in parts])
