"""SmoothQuant (Xiao et al., 2023): outlier channels of activations are divided by what the weights are multiplied with.

    x ─ Q ─ linear(W)     ⇒     x · 1/s ─ Q ─ linear(W · s),     s = max|x|^α / max|W|^(1-α) per input channel

α is searched for every group of linears that read one tensor, "none" included: the one with the least squared error of
the group's products, inputs and weights quantized. Where calibration finds the range of the input, s and the range are
those of one half of the data and the error is that of the other, and both ways: with a large α all channels reach the
end of the range, which looks best on the few rows that it was found on and cuts all others off. Inputs have one scale,
or one per token; where they have one per group they are searched as if they had one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from graphq.algorithms.base import ALGORITHMS, Run
from graphq.algorithms.grid import Grid
from graphq.algorithms.samples import RowSamples
from graphq.algorithms.scaling import Group, groups, search_scales, tied, weights
from graphq.algorithms.scaling_layers import Entries, listed
from graphq.config.selectors import matches
from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError, did_you_mean
from graphq.graph.decision import decision_of
from graphq.graph.view import LayerView
from graphq.numerics.affine import fake_quantize
from graphq.numerics.products import linear
from graphq.passes.placement import quantizer_at

ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 10))
CLIPS = (1.0, 0.9, 0.8, 0.65, 0.5)  # parts of the range that observers may choose
SMALLEST = 1e-5
Alpha = float | Literal["search", "log"]
ROWS = 512  # of every tensor


@ALGORITHMS.register("smoothquant")
def smoothquant(
    graphs: Sequence[fx.GraphModule], run: Run, *, alpha: Alpha | dict[str, Alpha | None] = "search",
    scaling_layers: Entries | None = None, model_decoder_layers: str | None = None,
) -> None:  # fmt: skip
    """alpha: how much of the difficulty moves from activations to weights, 0 to 1; or "search"; or "log": s is
    max|x| / log2(2 + max|x|), whatever the weights are. Or these by selectors of linears, of which the last that fits
    counts; null for no scale; linears that none selects are searched. scaling_layers:
    the only groups that are scaled, by names inside each of model_decoder_layers ("model.layers")."""
    for value in alpha.values() if isinstance(alpha, dict) else [alpha]:
        known = value in ("search", "log") or (isinstance(value, (int, float)) and 0 <= value <= 1)
        if not known and not (value is None and isinstance(alpha, dict)):
            raise ConfigError(f"alpha is a number from 0 to 1, 'search' or 'log', not {value!r}", where="smoothquant")
    every = [{g.name: g for g in groups(gm) if g.quantized} for gm in graphs]
    if not set.intersection(*map(set, every)):
        raise ConfigError(
            f"in {'a' if len(graphs) > 1 else 'the'} graph no quantized tensor is read by quantized linears alone",
            where="smoothquant",
            remedy="Leave it out (the preset int8 is int8_smoothquant without it); awq is for weights alone.",
        )
    asked = _by_group(graphs[0], every[0], alpha) if isinstance(alpha, dict) else dict.fromkeys(every[0], alpha)
    every[0] = listed(graphs[0], every[0], scaling_layers, model_decoder_layers, "smoothquant")
    every[0] = {name: group for name, group in every[0].items() if asked[name] is not None}

    def choose(group: Group, seen: RowSamples) -> Tensor | None:
        how = asked[group.name]
        assert how is not None
        if how == "search":
            return _searched(graphs[0], group, seen)
        largest = seen.largest.amax(0)
        if how == "log":
            above = largest.clamp(min=SMALLEST)
            scale = _even(above / (2 + above).log2(), largest)
        else:
            scale = _scale(largest, _weights_largest(graphs[0], group), float(how))
        return tied(graphs[0], group)(scale)

    # of all tokens, also those of padding: the scale of the tensor is for them too
    search_scales(graphs, run, every, choose, label="smoothquant", most=ROWS, padding=True)


def _by_group(gm: fx.GraphModule, named: dict[str, Group], alpha: dict[str, Alpha | None]) -> dict[str, Alpha | None]:
    """What is asked for each group. Raises ConfigError for a selector of nothing, and for groups of two minds."""
    views = {name: [LayerView(gm, n) for n in group.linears] for name, group in named.items()}
    paths = [v.path for every in views.values() for v in every]
    for selector in alpha:
        if not any(matches(selector, v) for every in views.values() for v in every):
            raise ConfigError(
                f"alpha: {selector!r} selects no linear with a quantized input",
                where="smoothquant",
                remedy=did_you_mean(selector, paths),
            )
    asked: dict[str, Alpha | None] = {}
    for name, every in views.items():
        found = [_last_that_fits(alpha, view) for view in every]
        if any(a != found[0] for a in found):
            raise ConfigError(
                "linears that read one tensor have one scale, and alpha asks for several",
                where=", ".join(v.path for v in every),
                remedy="Select all of them.",
            )
        asked[name] = found[0]
    return asked


def _last_that_fits(alpha: dict[str, Alpha | None], view: LayerView) -> Alpha | None:
    return next((a for selector, a in reversed(alpha.items()) if matches(selector, view)), "search")


def _weights_largest(gm: fx.GraphModule, group: Group) -> Tensor:
    return torch.stack([w.abs().amax(0) for w in weights(gm, group)]).amax(0)


def _scale(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    return _even(activations.clamp(min=SMALLEST).pow(alpha) / weights.clamp(min=SMALLEST).pow(1 - alpha), activations)


def _even(scale: Tensor, activations: Tensor) -> Tensor:
    """[in], with geometric mean one. A channel that is zero in all data keeps one: who knows what it will be."""
    alive = activations > 0
    mean = scale[alive].log().mean().exp() if alive.any() else scale.new_ones(())
    return torch.where(alive, (scale / mean).clamp(min=SMALLEST), torch.ones_like(scale))


def _searched(gm: fx.GraphModule, group: Group, seen: RowSamples) -> Tensor | None:
    """The best scale, or None where none is better than no scale."""
    if seen.count < 2:
        return None  # nothing to judge by
    own, largest, tie = weights(gm, group), _weights_largest(gm, group), tied(gm, group)
    spec = quantizer_at(gm, group.readers[0]).spec
    specs = [decision_of(n).weight_spec for n in group.linears]  # type: ignore[union-attr]

    def candidates(activations: Tensor) -> list[Tensor]:
        return [torch.ones_like(largest), *(tie(_scale(activations, largest, a)) for a in ALPHAS)]

    first, second = slice(0, 1), slice(1, 2)
    apart = [(first, seen.rows_in(1)), (second, seen.rows_in(0))]
    errors = torch.zeros(1 + len(ALPHAS), dtype=torch.float64)
    for part, rows in [(slice(0, 2), seen.rows)] if spec.dynamic else apart:  # ranges found at run time cut nothing off
        wanted = [linear(rows, w) for w in own]
        for i, scale in enumerate(candidates(seen.largest[part].amax(0))):
            rounded = [_rounded_weight(w * scale, s) for w, s in zip(own, specs, strict=True)]
            ends = (seen.lowest[part] / scale).min(), (seen.highest[part] / scale).max()
            clips = (1.0,) if spec.dynamic else CLIPS
            errors[i] += min(_error(rows / scale, (ends[0] * c, ends[1] * c), spec, rounded, wanted) for c in clips)
    best = int(errors.argmin())
    return candidates(seen.largest.amax(0))[best] if best else None


def _error(
    x: Tensor, ends: tuple[Tensor, Tensor], spec: QuantSpec, weights: list[Tensor], wanted: list[Tensor]
) -> float:
    if spec.granularity == "token":
        qparams, block = spec.choose(x.amin(1, keepdim=True), x.amax(1, keepdim=True)), spec.block_for(2)
    else:
        qparams, block = spec.choose(*ends), ()
    x = fake_quantize(x, *qparams, block, spec.number_format)
    return sum((linear(x, w) - y).square().sum().item() for w, y in zip(weights, wanted, strict=True))


def _rounded_weight(weight: Tensor, spec: QuantSpec | None) -> Tensor:
    assert spec is not None
    block = spec.block_for(2)
    if spec.granularity not in ("tensor", "channel"):
        return Grid(spec.model_copy(update={"observer": "minmax", "observer_args": {}}), block, weight).rounded(weight)
    largest = weight.abs().amax(1, keepdim=True) if block else weight.abs().max()
    scale, zero = spec.choose(-largest, largest)
    return fake_quantize(weight, scale, zero, block, spec.number_format, narrow_range=spec.narrow_range)
