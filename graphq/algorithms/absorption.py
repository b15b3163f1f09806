"""Absorption of biases (Nagel et al., 2019): what a channel hardly falls below moves through the relu behind it.

    W1·x + b1 ─ relu ─ W2, b2     ⇒     W1·x + (b1 - c) ─ relu ─ W2, b2 + W2·c,     c = max(0, mean - 3·deviation)

mean, deviation: of each channel of W1·x + b1 over the calibration data. The tensor between gets a smaller range and
finer steps. The function stays where that channel does not fall below c: for normal distributions all but one value in
a thousand; what falls below is off by at most c. Where W2 is padded its zeros would have to be c, and nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from graphq.algorithms.base import Run
from graphq.algorithms.layers import Layer
from graphq.errors import NOT_FINITE, CalibrationError
from graphq.graph.optable import family_of
from graphq.graph.view import parameter
from graphq.observers.tokens import MaskWatchers, counted, mask_of, mask_watchers

DEVIATIONS = 3
FEWEST = 64  # values of a channel: fewer know no deviation


class ChannelMoments(nn.Module):
    """Count, sum and sum of squares of every channel of the tensors it is called with. axis: of the channels. Tokens
    that a mask leaves out do not count."""

    def __init__(self, axis: int, masks: MaskWatchers = ()) -> None:
        super().__init__()
        self.axis, self.masks, self.count = axis, masks, 0
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def forward(self, x: Tensor) -> None:
        rows = counted(x.detach().movedim(self.axis, -1), mask_of(self.masks)).double()
        self.count += len(rows)
        self.total, self.squares = self.total + rows.sum(0), self.squares + rows.square().sum(0)

    def lowest(self) -> Tensor:
        """mean - 3·deviation, or zero if that is less [channels]."""
        mean = torch.as_tensor(self.total / self.count)
        spread = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return (mean - DEVIATIONS * spread).clamp(min=0).float()


def shifts(run: Run, pairs: Sequence[list[tuple[Layer, Layer]]]) -> dict[str, Tensor]:
    """c [channels] of every pair that can absorb something, by the name of the first layer's node. In one run over the
    data. pairs: the same ones in each graph. Raises CalibrationError for data that say nothing of a channel."""
    can = set.intersection(*({a.node.name for a, b in every if _absorbs(a, b)} for every in pairs))
    layers = [first for first, _ in pairs[0] if first.node.name in can]
    if not layers:
        return {}
    masks = mask_watchers(layers[0].view.gm)
    seen = [ChannelMoments(1 - len(layer.shape_of_weight), masks) for layer in layers]
    run([*masks, *zip((layer.node for layer in layers), seen, strict=True)])
    found = {}
    for layer, moments in zip(layers, seen, strict=True):
        if moments.count < FEWEST:
            raise CalibrationError(
                f"{moments.count} values of each channel are too few to say what it does not fall below",
                where=layer.view.where(),
                remedy="Give more calibration data, or absorb: false.",
            )
        lowest = moments.lowest()
        if not lowest.isfinite().all():
            raise CalibrationError("what this layer computes is not finite", where=layer.view.where(),
                                   remedy=NOT_FINITE)  # fmt: skip
        if lowest.any():
            found[layer.node.name] = lowest
    return found


def _absorbs(first: Layer, second: Layer) -> bool:
    """Have both a bias, and is there a relu between them, and nothing that would see the shift?"""
    if any(parameter(layer.view.gm, layer.view.arg("bias")) is None for layer in (first, second)):
        return False
    if second.view.family == "conv" and any(second.view.arg("padding")):
        return False
    node, between = second.node.args[0], []
    while isinstance(node, fx.Node) and node is not first.node:
        if node.op != "call_module":
            between.append(family_of(node.target))
        node = node.args[0]
    return between == ["relu"]
