"""Grid: the values that the codes of one weight stand for, column by column."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphq.config.spec import QuantSpec
from graphq.numerics.affine import check_divides, fake_quantize, quantize
from graphq.numerics.formats import Integer
from graphq.numerics.scales import TWO_LEVEL
from graphq.observers import make_observer
from graphq.observers.mse_grid import WeightedMseGrid


class Grid:
    """Scales and zero points of a weight [out, in], found by its spec's observer.

    block: of the spec, () or (rows, columns) as in `graphq.numerics.affine`. width: columns that share a scale.
    overall: the largest magnitude of all weights that share a scale over their scales. importance: of every
    element, or of the columns ([1, in] or [in]), for observers that want it.
    """

    def __init__(
        self,
        spec: QuantSpec,
        block: tuple[int, ...],
        weight: Tensor,
        *,
        overall: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> None:
        self.spec, self.block, self.shape, self.importance = spec, block, weight.shape, importance
        self.overall = weight.abs().max() if overall is None else overall
        self.width = block[1] if block and block[1] != -1 else weight.shape[1]
        self.scale, self.zero = self._fit(weight, block, importance)
        self.fast = isinstance(spec.number_format, Integer) and spec.rounding == "half_even"

    def _fit(self, weight: Tensor, block: tuple[int, ...], importance: Tensor | None) -> tuple[Tensor, Tensor]:
        observer = make_observer(self.spec, block)
        if isinstance(observer, WeightedMseGrid):
            observer.importance = importance
        observer.update(weight)
        overall = self.overall if self.spec.scale in TWO_LEVEL else None
        return self.spec.choose(*observer.range(), overall)

    def refit(self, start: int, columns: Tensor) -> None:
        """New scales for the group that starts at this column, from its values [out, width] as they are now."""
        part = None if self.importance is None else self.importance[..., start : start + columns.shape[1]]
        scale, zero = self._fit(columns, (1, -1) if self.block[0] == 1 else (self.block[0], -1), part)
        group = start // self.width
        self.scale[:, group : group + 1], self.zero[:, group : group + 1] = scale, zero

    def split(self, rows: Sequence[int]) -> list[Grid]:
        """The grids of so many rows each; a new scale of a part is one of the whole."""
        found, start = [], 0
        for count in rows:
            part, own = copy.copy(self), slice(start, start + count)
            part.shape, start = torch.Size((count, self.shape[1])), start + count
            if self.importance is not None and self.importance.ndim == 2 and len(self.importance) > 1:
                part.importance = self.importance[own]
            if self.block and self.block[0] == 1:
                part.scale, part.zero = self.scale[own], self.zero[own]
            found.append(part)
        return found

    def rounded(self, weight: Tensor) -> Tensor:
        """The nearest values of the grid."""
        return fake_quantize(weight, self.scale, self.zero, self.block, self.spec.number_format, **self._how)

    def columns(self) -> tuple[Tensor, Tensor]:
        """(scale, zero point), one for every weight or broadcastable to it: [out or 1, in]."""
        if not self.block:
            return self.scale.reshape(1, 1).expand(1, self.shape[1]), self.zero.reshape(1, 1).expand(1, self.shape[1])
        rows = 1 if self.block[0] in (1, -1) else self.block[0]
        parts = (t.repeat_interleave(rows, 0)[: self.shape[0]] for t in (self.scale, self.zero))
        first, second = (t.repeat_interleave(self.width, 1)[:, : self.shape[1]] for t in parts)
        return first, second

    def nearest(self, places: Tensor | None = None) -> Callable[[Tensor, int, Tensor], Tensor]:
        """A function (values [out] of a column, its place, result) → the nearest values, written into the result.

        places [groups, in]: the order of the columns in each of equal groups of the rows; the function's places are
        those of this order then.
        """
        spec, (first, second) = self.spec, self.columns()

        def by_column(param: Tensor) -> Tensor:
            turned = param.T.contiguous()
            return turned if places is None else _in_order(turned, places, self.shape[0])

        scales = by_column(first)
        if not self.fast:
            zeros = by_column(second)

            def rounded(values: Tensor, at: int, result: Tensor) -> Tensor:
                steps, zero = (t[at].expand_as(values)[:, None] for t in (scales, zeros))
                found = fake_quantize(values[:, None], steps, zero, (1, 1), spec.number_format, **self._how)
                return result.copy_(found[:, 0])

            return rounded
        lowest, highest = spec.number_format.limits(spec.narrow_range)
        if not self.zero.any():

            def symmetric(values: Tensor, at: int, result: Tensor) -> Tensor:
                return torch.div(values, scales[at], out=result).round_().clamp_(lowest, highest).mul_(scales[at])

            return symmetric
        low, high = ((limit - by_column(second)).float() for limit in (lowest, highest))

        def fast(values: Tensor, at: int, result: Tensor) -> Tensor:
            return torch.div(values, scales[at], out=result).round_().clamp_(low[at], high[at]).mul_(scales[at])

        return fast

    def codes(self, weight: Tensor) -> Tensor:
        """Codes of a weight on the grid."""
        return quantize(weight, self.scale, self.zero, self.block, self.spec.number_format, **self._how)

    @property
    def _how(self) -> dict[str, Any]:
        spec = self.spec
        return {"narrow_range": spec.narrow_range, "rounding": spec.rounding, "saturate": spec.saturate}


def grid_of(
    spec: QuantSpec, block: tuple[int, ...], weight: Tensor, hessian: Tensor, overall: Tensor | None = None
) -> Grid:
    """The grid of a weight whose inputs have these second moments [groups, in, in]. Raises ConfigError for groups that
    do not divide it."""
    if not spec.ragged:
        check_divides(weight.shape, block)
    importance = hessian.diagonal(dim1=1, dim2=2)  # one row is enough where all have the same inputs
    if len(hessian) > 1:
        importance = importance.repeat_interleave(len(weight) // len(hessian), 0)
    return Grid(spec, block, weight, overall=overall, importance=importance)


def _in_order(columns: Tensor, places: Tensor, rows: int) -> Tensor:
    """columns [in, rows or 1], of all groups, each group's in its own order."""
    groups = len(places)
    apart = columns.expand(-1, rows).unflatten(1, (groups, -1))
    return apart.gather(0, places.T[..., None].expand_as(apart)).flatten(1)
