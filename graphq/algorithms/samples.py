"""Rows of a tensor, a bounded number of them, and the range of every channel: what searches look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from graphq.algorithms.base import Run
from graphq.graph.on_disk import on_disk
from graphq.observers.tokens import MaskWatchers, TokenMask, counted, mask_of, mask_watchers, masks_for


class RowSamples(nn.Module):
    """Keeps evenly spaced rows of the tensors […, channels] that it is called with, and range and mean magnitude per
    channel.

    Deterministic, and bounded: when there are too many rows, every other one goes, and of later tensors too. Tokens
    that a mask leaves out do not count. Ranges are kept for two halves of the rows, drawn by lot, so that what one has
    shown can be judged by the other.
    """

    lowest: Tensor  # [half, channels]
    highest: Tensor
    magnitude: Tensor

    def __init__(self, most: int, masks: MaskWatchers = ()) -> None:
        super().__init__()
        self.masks = masks
        self.most, self.step, self.count = most, 1, 0
        self.order = torch.Generator().manual_seed(0)
        self.reached = False  # by any row, those included that do not count
        self.kept: list[Tensor] = []
        self.halves: list[Tensor] = []  # of the kept rows: are they in the second?

    def forward(self, x: Tensor) -> None:
        self.reached |= x.numel() > 0
        rows = counted(x.detach(), mask_of(self.masks)).float()
        if not len(rows):
            return
        if not self.count:
            self.lowest, self.highest = (rows.new_full((2, rows.shape[1]), far) for far in (torch.inf, -torch.inf))
        drawn = torch.rand(len(rows), generator=self.order, device="cpu") < 0.5
        second = drawn.to(rows.device)
        for half, some in enumerate((rows[~second], rows[second])):
            if len(some):
                self.lowest[half] = torch.minimum(self.lowest[half], some.amin(0))
                self.highest[half] = torch.maximum(self.highest[half], some.amax(0))
        magnitude = rows.abs().sum(0, dtype=torch.float64)
        self.magnitude = magnitude if not self.count else self.magnitude + magnitude
        first = -self.count % self.step
        self.count += len(rows)
        self.kept.append(rows[first :: self.step].clone())
        self.halves.append(drawn[first :: self.step])
        while sum(map(len, self.kept)) > self.most:
            self.kept, self.halves = [torch.cat(self.kept)[::2]], [torch.cat(self.halves)[::2]]
            self.step *= 2

    @property
    def rows(self) -> Tensor:
        """[at most `most`, channels]."""
        return torch.cat(self.kept)

    def rows_in(self, half: int) -> Tensor:
        """Those of the kept rows that are in half 0 or 1."""
        return self.rows[(torch.cat(self.halves) == bool(half)).to(self.lowest.device)]

    @property
    def largest(self) -> Tensor:
        """Largest magnitude [half, channels]."""
        return torch.maximum(-self.lowest, self.highest)

    @property
    def mean(self) -> Tensor:
        """Mean magnitude [channels]."""
        return (self.magnitude / self.count).float()


def rows_of(
    gm: fx.GraphModule, run: Run, sources: dict[str, fx.Node], most: int, *, padding: bool
) -> Iterator[tuple[str, RowSamples]]:
    """(name, what was seen of the tensor), in the order given, which is that of the graph.

    In one run over the data; or, where weights are on disk, of one tensor after the other, while all samples go through
    the graph in step. padding: look at tokens too that do not count.
    """
    if any(on_disk(t) for t in itertools.chain(gm.parameters(), gm.buffers())):
        stream, mask = run.stream(gm), TokenMask()
        for name, source in sources.items():
            seen = RowSamples(most, () if padding else masks_for(source, [(source, mask)]))
            for x, mask.value in zip(stream.until(source), stream.masks, strict=True):
                seen(x)
            yield name, seen
        return
    masks = [] if padding else mask_watchers(gm)
    every = {name: RowSamples(most, masks_for(source, masks)) for name, source in sources.items()}
    run([*masks, *((source, every[name]) for name, source in sources.items())])
    for name in sources:
        yield name, every.pop(name)  # not needed after this
