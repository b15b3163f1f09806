"""AWQ (Lin et al., 2023): input channels that carry much are multiplied before their weights are rounded.

    x ─ linear(W)     ⇒     x · 1/s ─ linear(Q(W · s)),     s = mean|x|^r, or mean|x|^r / mean|W|^(1-r)

r and the form are searched for every group of linears that read one tensor, "none" included: what has the least squared
error of the group's products on samples of the calibration data. Of W every value counts relative to the largest of
those that share its scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphq.algorithms.base import ALGORITHMS, Run
from graphq.algorithms.grid import Grid
from graphq.algorithms.samples import RowSamples
from graphq.algorithms.scaling import Group, groups, search_scales, tied, weights
from graphq.algorithms.scaling_layers import Entries, listed
from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError
from graphq.graph.decision import decision_of
from graphq.numerics.affine import blocks_of, expand
from graphq.numerics.products import linear
from graphq.passes.placement import quantizer_at, quantizer_calls

SMALLEST = 1e-4
COARSE = 20  # grid of an observer that searches
ROWS = 256  # of every tensor, evenly spaced: more change no choice and take longer


@ALGORITHMS.register("awq")
def awq(
    graphs: Sequence[fx.GraphModule], run: Run, *, grid: int = 10, duo: bool = True,
    scaling_layers: Entries | None = None, model_decoder_layers: str | None = None,
) -> None:  # fmt: skip
    """grid: values of r up to 1 that are tried. duo: try the form with the weights' magnitudes too. scaling_layers: the
    only groups that are scaled, by names inside each of model_decoder_layers ("model.layers")."""
    if grid < 1:
        raise ConfigError(f"a grid has at least one step, not {grid}", where="awq")
    every = [{g.name: g for g in groups(gm)} for gm in graphs]
    if not set.intersection(*map(set, every)):
        raise ConfigError("no linear has a quantized weight of its own", where="awq", remedy="Quantize weights.")
    every[0] = listed(graphs[0], every[0], scaling_layers, model_decoder_layers, "awq")

    def choose(group: Group, seen: RowSamples) -> Tensor | None:
        return _searched(graphs[0], group, seen, grid, duo)

    search_scales(graphs, run, every, choose, label="awq", most=ROWS, padding=False)


def _searched(gm: fx.GraphModule, group: Group, seen: RowSamples, steps: int, duo: bool) -> Tensor | None:
    """The best scale, or None where none is better than no scale."""
    own, rows, tie = weights(gm, group), seen.rows, tied(gm, group)
    calls = [quantizer_calls(decision_of(n))[1] for n in group.linears]  # type: ignore[arg-type]
    quantizers = [quantizer_at(gm, c) for c in calls if c is not None]
    importance = _importance(own, [q.block for q in quantizers])
    alive = seen.mean > 0  # a channel that is zero in all data keeps its weights as they are
    if not alive.any():
        return None
    best, chosen = _loss(own, quantizers, rows, torch.ones_like(rows[0])), None
    for step in range(1, steps + 1):
        share = step / steps
        base = seen.mean.clamp(min=SMALLEST).pow(share)
        forms = [base, base / importance.pow(1 - share).clamp(min=SMALLEST)] if duo else [base]
        for form in forms:
            some = form[alive]
            scale = tie(torch.where(alive, form / (some.max() * some.min()).sqrt(), torch.ones_like(form)))
            loss = _loss(own, quantizers, rows, scale)
            if loss < best:
                best, chosen = loss, scale
    return chosen


def _importance(own: list[Tensor], blocks: list[tuple[int, ...]]) -> Tensor:
    """Mean of |W| relative to the largest that shares its scale, by column [in]."""
    parts = []
    for weight, block in zip(own, blocks, strict=True):
        largest = blocks_of(weight.abs(), block).amax(-1)
        parts.append(weight.abs() / expand(largest if block else largest.reshape(()), weight.shape, block).clamp(1e-12))
    return torch.cat(parts).mean(0)


def _loss(own: list[Tensor], quantizers: list, rows: Tensor, scale: Tensor) -> float:  # type: ignore[type-arg]
    total = 0.0
    for weight, quantizer in zip(own, quantizers, strict=True):
        scaled, seen = weight * scale, (rows / scale).square().mean(0)
        rounded = Grid(_coarse(quantizer.spec), quantizer.block, scaled, importance=seen).rounded(scaled) / scale
        total += linear(rows, rounded - weight).square().sum().item()
    return total


def _coarse(spec: QuantSpec) -> QuantSpec:
    """With fewer steps, where ranges are searched for: a search in a search."""
    searched = spec.observer in ("mse_grid", "imatrix_mse")
    args = {**spec.observer_args, "grid": min(COARSE, int(spec.observer_args.get("grid", COARSE)))} if searched else {}
    return spec.model_copy(update={"observer": spec.observer if searched else "minmax", "observer_args": args})
