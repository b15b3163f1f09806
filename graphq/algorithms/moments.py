"""Second moments of what a layer reads: all that weight algorithms know of the calibration data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graphq.algorithms.base import Stream, expect_data
from graphq.algorithms.layers import Layer, input_rows
from graphq.graph.expert_ops import bounds
from graphq.numerics.products import add_moments, matmul, mirrored


@dataclass(frozen=True)
class Moments:
    """Of the inputs of layers that are cut into rows alike. hessian: Σ X̂ᵀX̂ [groups, in, in] over `rows` rows each (of
    experts the mean); cross: for each group Σ (X - X̂)ᵀX̂ [in, in] or None. unseen: groups that no row of the data has
    reached, which are rounded to the nearest: experts, or a layer on its own that the model has not chosen once."""

    hessian: Tensor
    cross: Sequence[Tensor | None]
    rows: float
    unseen: tuple[int, ...] = ()


def moments_of(layer: Layer, inputs: list[Tensor], wanted: list[Tensor] | None, stream: Stream) -> Moments:
    """inputs, wanted: X̂ and X, one tensor for each batch of the stream. Raises CalibrationError for none, for none that
    counts, and for what is not finite."""
    if layer.offsets is not None:
        return _moments_of_experts(layer, inputs, stream.until(layer.offsets))
    total: Tensor | None = None
    cross: Tensor | None = None
    count = 0
    for number, x in enumerate(inputs):
        rows = input_rows(layer, x, stream.masks[number])
        total = rows.new_zeros(len(rows), *[rows.shape[2]] * 2) if total is None else total
        add_moments(total, rows)
        count += rows.shape[1]
        if wanted is not None:
            lost = input_rows(layer, wanted[number], stream.masks[number]) - rows
            moment = matmul(lost.transpose(1, 2), rows)
            cross = moment if cross is None else cross + moment
    reached = not inputs or any(x.numel() for x in inputs)
    if reached or total is None:
        expect_data(layer.view, count, None if total is None else total.diagonal(dim1=1, dim2=2))
    assert total is not None
    groups = len(total)
    every = list(cross) if cross is not None else [None] * groups
    return Moments(mirrored(total), every, count, () if reached else tuple(range(groups)))


def _moments_of_experts(layer: Layer, inputs: list[Tensor], offsets: list[Tensor]) -> Moments:
    """Each expert has its own rows. Without cross terms: the float model may send a token to other experts."""
    experts, width = len(offsets[0]), inputs[0].shape[-1]
    total, counts = inputs[0].new_zeros(experts, width, width).float(), [0] * experts
    for x, ends in zip(inputs, offsets, strict=True):
        for expert, (start, stop) in enumerate(bounds(ends)):
            if stop > start:
                add_moments(total[expert : expert + 1], x[None, start:stop].float())
            counts[expert] += stop - start
    expect_data(layer.view, sum(counts), total.diagonal(dim1=1, dim2=2))
    unseen = tuple(expert for expert, count in enumerate(counts) if count == 0)
    return Moments(mirrored(total), [None] * experts, sum(counts) / experts, unseen)
