"""Mean of every channel, or of its squares: what bias correction and importance need to know of a layer's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphq.observers.tokens import MaskWatchers, counted, mask_of


class ChannelMean(nn.Module):
    """Running mean [channels] of the tensors that it is called with, or of a power of them, summed in float64.

    axis: that of the channels. masks: tokens that they leave out do not count, where channels come last.
    """

    def __init__(self, axis: int, power: int = 1, masks: MaskWatchers = ()) -> None:
        super().__init__()
        self.axis, self.power, self.masks = axis, power, masks
        self.total: Tensor | None = None
        self.count = 0

    def forward(self, x: Tensor) -> None:
        if self.masks and self.axis % x.ndim == x.ndim - 1:
            x = counted(x, mask_of(self.masks))
        others = [d for d in range(x.ndim) if d != self.axis % x.ndim]
        x = x.detach() if self.power == 1 else x.detach().pow(self.power)
        total = (x.sum(others, dtype=torch.float32) if others else x).double()
        self.total = total if self.total is None else self.total.add_(total)
        self.count += x.numel() // x.shape[self.axis]

    @property
    def mean(self) -> Tensor | None:
        """[channels], float64; None before anything was seen."""
        return None if self.total is None else self.total / max(self.count, 1)
