"""Largest value of every channel: what the saturation guard needs to know of a layer's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ChannelMaximum(nn.Module):
    """Running maximum [channels] of the tensors that it is called with. axis: that of the channels."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.largest: Tensor | None = None

    def forward(self, x: Tensor) -> None:
        others = [d for d in range(x.ndim) if d != self.axis % x.ndim]
        largest = x.detach().amax(others) if others else x.detach().clone()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
