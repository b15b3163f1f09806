"""Absorption of biases (Nagel et al., 2019): what a channel hardly falls below moves through the relu behind it.

    W1·x + b1 ─ relu ─ W2, b2     ⇒     W1·x + (b1 - c) ─ relu ─ W2, b2 + W2·c,     c = max(0, mean - 3·deviation)

mean, deviation: of each channel of W1·x + b1 over the calibration data. The tensor between gets a smaller range and
finer steps. The function stays where that channel does not fall below c: for normal distributions all but one value in
a thousand; what falls below is off by less than c. Where W2 is padded its zeros would have to be c, and nothing moves.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from graphq.algorithms.base import Run
from graphq.algorithms.layers import Layer
from graphq.graph.optable import family_of
from graphq.graph.view import parameter

DEVIATIONS = 3


class ChannelMoments(nn.Module):
    """Count, sum and sum of squares of every channel of the tensors it is called with. axis: of the channels."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis, self.count = axis, 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def forward(self, x: Tensor) -> None:
        rows = x.detach().movedim(self.axis, -1).flatten(0, -2).double()
        self.count += len(rows)
        self.total, self.squares = self.total + rows.sum(0), self.squares + rows.square().sum(0)

    @property
    def lowest(self) -> Tensor:
        """mean - 3·deviation, or zero if that is less [channels]."""
        mean = torch.as_tensor(self.total / self.count)
        spread = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return (mean - DEVIATIONS * spread).clamp(min=0).float()


def shifts(gm: fx.GraphModule, run: Run, pairs: list[tuple[Layer, Layer]]) -> dict[str, Tensor]:
    """c [channels] of every pair that can absorb something, by the name of the first layer's node. In one run over the
    data."""
    moments = {
        first.node: ChannelMoments(1 - len(first.shape_of_weight)) for first, second in pairs if _absorbs(first, second)
    }
    if moments:
        run(list(moments.items()))
    found = {node.name: seen.lowest for node, seen in moments.items()}
    return {name: c for name, c in found.items() if bool(c.any())}


def _absorbs(first: Layer, second: Layer) -> bool:
    """Have both a bias of their own, and is there a relu between them, and nothing that would see the shift?"""
    if any(parameter(layer.view.gm, layer.view.arg("bias")) is None for layer in (first, second)):
        return False
    if len(second.view.arg("bias").users) > 1:
        return False
    if second.view.family == "conv" and any(second.view.arg("padding")):
        return False
    node, between = second.node.args[0], []
    while isinstance(node, fx.Node) and node is not first.node:
        if node.op != "call_module":
            between.append(family_of(node.target))
        node = node.args[0]
    return between == ["relu"]
