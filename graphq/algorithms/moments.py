"""Second moments of what a layer reads: all that weight algorithms know of the calibration data.

Where a layer sees few rows for its many inputs, what is learned from them may be worse on others than rounding to the
nearest. There one row in eight is held out, by which the choice is judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphq.algorithms.base import Stream, expect_data
from graphq.algorithms.layers import Layer, input_rows
from graphq.graph.expert_ops import bounds
from graphq.numerics.products import add_moments, matmul, mirrored

FEW = 4  # rows for every input, at most: with more, none is held out
SHARE, MOST_HELD, LEAST = 1 / 8, 256, 16  # of the rows that is held out, and at most; with fewer than LEAST, none is


@dataclass(frozen=True)
class Moments:
    """Of the inputs of layers that are cut into rows alike. hessian: Σ X̂ᵀX̂ [groups, in, in] over `rows` rows each (of
    experts the mean); cross: for each group Σ (X - X̂)ᵀX̂ [in, in] or None. unseen: groups that no row of the data has
    reached, which are rounded to the nearest: experts, or a layer on its own that the model has not chosen once. held:
    for each group rows [n, in] that are not in the sums, or None."""

    hessian: Tensor
    cross: Sequence[Tensor | None]
    rows: float
    unseen: tuple[int, ...] = ()
    held: Sequence[Tensor | None] = ()


@dataclass
class _HeldOut:
    """share: of the rows; none where these are many, or next to none."""

    share: float
    order: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    rows: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, rows: int, inputs: int) -> _HeldOut:
        """For about so many rows, of so many inputs each."""
        return cls(min(SHARE, MOST_HELD / rows) if LEAST <= rows <= FEW * inputs else 0.0)

    def split(self, *tensors: Tensor) -> list[Tensor]:
        """What is left of tensors [groups, n, in] that belong together. What the first loses is kept."""
        if not self.share:
            return list(tensors)
        held = torch.rand(tensors[0].shape[1], generator=self.order).to(tensors[0].device) < self.share
        self.rows.append(tensors[0][:, held])
        return [t[:, ~held] for t in tensors]

    def by_group(self, groups: int) -> list[Tensor | None]:
        together = torch.cat(self.rows, 1) if self.rows else None
        return [None] * groups if together is None or not together.numel() else list(together)


def moments_of(
    layer: Layer, inputs: list[Tensor], wanted: list[Tensor] | None, stream: Stream, *, hold_out: bool = True
) -> Moments:
    """inputs, wanted: X̂ and X, one tensor for each batch of the stream. hold_out: rows to judge by, where they are few.
    Raises CalibrationError for none, for none that counts, and for what is not finite."""
    if layer.offsets is not None:
        return _moments_of_experts(layer, inputs, stream.until(layer.offsets))
    total: Tensor | None = None
    cross: Tensor | None = None
    count, held = 0, _HeldOut(0.0)
    for number, x in enumerate(inputs):
        every = [input_rows(layer, t, stream.masks[number]) for t in (x, *([] if wanted is None else [wanted[number]]))]
        if total is None:
            groups, rows_here, width = every[0].shape
            total = every[0].new_zeros(groups, width, width)
            held = _HeldOut.of(rows_here * len(inputs), width) if hold_out else held
        rows, *exact = held.split(*every)
        add_moments(total, rows)
        count += rows.shape[1]
        for other in exact:
            moment = matmul((other - rows).transpose(1, 2), rows)
            cross = moment if cross is None else cross + moment
    reached = not inputs or any(x.numel() for x in inputs)
    if reached or total is None:
        expect_data(layer.view, count, None if total is None else total.diagonal(dim1=1, dim2=2))
    assert total is not None
    groups = len(total)
    crosses = list(cross) if cross is not None else [None] * groups
    unseen = () if reached else tuple(range(groups))
    return Moments(mirrored(total), crosses, count, unseen, held.by_group(groups))


def _moments_of_experts(layer: Layer, inputs: list[Tensor], offsets: list[Tensor]) -> Moments:
    """Each expert has its own rows. Without cross terms: the float model may send a token to other experts."""
    experts, width = len(offsets[0]), inputs[0].shape[-1]
    parts = [list(bounds(ends)) for ends in offsets]
    given = [sum(stop - start for start, stop in own) for own in zip(*parts, strict=True)]
    total, counts = inputs[0].new_zeros(experts, width, width).float(), 0
    held = [_HeldOut.of(count, width) for count in given]
    for x, own in zip(inputs, parts, strict=True):
        for expert, (start, stop) in enumerate(own):
            if stop > start:
                [rows] = held[expert].split(x[None, start:stop].float())
                add_moments(total[expert : expert + 1], rows)
                counts += rows.shape[1]
    expect_data(layer.view, counts, total.diagonal(dim1=1, dim2=2))
    unseen = tuple(expert for expert, count in enumerate(given) if count == 0)
    judges = [h.by_group(1)[0] for h in held]
    return Moments(mirrored(total), [None] * experts, counts / experts, unseen, judges)
