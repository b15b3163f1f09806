"""Second moments of what a layer reads: all that weight algorithms know of the calibration data.

Where a layer sees few rows for its many inputs, what is learned from them may be worse on others than rounding to the
nearest. There one row in eight is held out (of convolutions one image), by which the choice is judged.
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
SHARE, ENOUGH, LEAST = (
    1 / 8,
    256,
    16,
)  # what is held out, and how many rows at most; of fewer pieces than LEAST, none is


@dataclass(frozen=True)
class Moments:
    """Of the inputs of layers that are cut into rows alike. hessian: Σ X̂ᵀX̂ [groups, in, in] over `rows` rows each (of
    experts the mean); cross: for each group Σ (X - X̂)ᵀX̂ [in, in] or None; held: for each group rows [n, in] that are
    not in these sums, or None. unseen: groups that no row of the data has reached, which are rounded to the nearest:
    experts, or a layer on its own that the model has not chosen once."""

    hessian: Tensor
    cross: Sequence[Tensor | None]
    rows: float
    held: Sequence[Tensor | None]
    unseen: tuple[int, ...] = ()


@dataclass
class _HeldOut:
    """share: of the rows; zero where these are many, or next to none."""

    share: float
    order: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    rows: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, rows: float, inputs: int, piece: int = 1) -> _HeldOut:
        """For about so many rows, of so many inputs each, in pieces of so many."""
        few = rows <= FEW * inputs and rows >= LEAST * piece
        return cls(min(SHARE, ENOUGH / rows) if few else 0.0)

    def split(self, *tensors: Tensor, piece: int = 1) -> list[Tensor]:
        """What is left of tensors [groups, n, in] that belong together. What the first loses is kept."""
        count = tensors[0].shape[1]
        if not self.share or sum(r.shape[1] for r in self.rows) >= ENOUGH:
            return list(tensors)
        pieces = torch.rand(-(-count // piece), generator=self.order, device="cpu") < self.share
        held = pieces.repeat_interleave(piece)[:count].to(tensors[0].device)
        self.rows.append(tensors[0][:, held])
        return [t[:, ~held] for t in tensors]

    def by_group(self, groups: int) -> list[Tensor | None]:
        """[n, in] each, or None without any."""
        together = torch.cat(self.rows, 1) if self.rows else None
        return [None] * groups if together is None or not together.numel() else list(together)


def moments_of(
    layer: Layer, inputs: list[Tensor], wanted: list[Tensor] | None, stream: Stream, *, hold_out: bool = True
) -> Moments:
    """inputs, wanted: X̂ and X, one tensor for each batch of the stream. hold_out: rows to judge by, where they are few.
    Raises CalibrationError for none, for none that counts, and for what is not finite."""
    if layer.offsets is not None:
        return _moments_of_experts(layer, inputs, stream.until(layer.offsets), hold_out)
    total: Tensor | None = None
    cross: Tensor | None = None
    count, held = 0, _HeldOut(0.0)
    for number, x in enumerate(inputs):
        every = [input_rows(layer, t, stream.masks[number]) for t in (x, *([] if wanted is None else [wanted[number]]))]
        groups, given, width = every[0].shape
        images = len(x) if x.ndim == len(layer.shape_of_weight) else 1
        piece = 1 if layer.view.family == "linear" else max(given // max(images, 1), 1)
        total = every[0].new_zeros(groups, width, width) if total is None else total
        if hold_out and not count and given:  # the first that has any tells how many there are
            held = _HeldOut.of(given * sum(t.numel() for t in inputs) / x.numel(), width, piece)
        rows, *exact = held.split(*every, piece=piece)
        add_moments(total, rows)
        count += rows.shape[1]
        for other in exact:
            moment = matmul((other - rows).transpose(1, 2), rows)
            cross = moment if cross is None else cross + moment
    groups = 0 if total is None else len(total)
    judges = held.by_group(groups)
    reached = not inputs or any(x.numel() for x in inputs)
    if reached:
        expect_data(layer.view, count, _sizes(total, judges))
    assert total is not None
    crosses = list(cross) if cross is not None else [None] * groups
    return Moments(mirrored(total), crosses, count, judges, () if reached else tuple(range(groups)))


def _moments_of_experts(layer: Layer, inputs: list[Tensor], offsets: list[Tensor], hold_out: bool) -> Moments:
    """Each expert has its own rows. Without cross terms: the float model may send a token to other experts."""
    experts, width = len(offsets[0]), inputs[0].shape[-1]
    parts = [list(bounds(ends)) for ends in offsets]
    given = [sum(stop - start for start, stop in own) for own in zip(*parts, strict=True)]
    total, count = inputs[0].new_zeros(experts, width, width, dtype=torch.float32), 0
    held = [_HeldOut.of(n, width) if hold_out else _HeldOut(0.0) for n in given]
    for x, own in zip(inputs, parts, strict=True):
        for expert, (start, stop) in enumerate(own):
            if stop > start:
                [rows] = held[expert].split(x[None, start:stop].float())
                add_moments(total[expert : expert + 1], rows)
                count += rows.shape[1]
    judges = [h.by_group(1)[0] for h in held]
    expect_data(layer.view, count, _sizes(total, judges))
    unseen = tuple(expert for expert, n in enumerate(given) if n == 0)
    return Moments(mirrored(total), [None] * experts, count / experts, judges, unseen)


def _sizes(total: Tensor | None, held: Sequence[Tensor | None]) -> Tensor | None:
    """Sums of squares [channels] of all groups one behind the other, also of what is held out."""
    if total is None:
        return None
    diagonal = total.diagonal(dim1=1, dim2=2)
    return torch.cat([d if h is None else d + h.square().sum(0) for d, h in zip(diagonal, held, strict=True)])
