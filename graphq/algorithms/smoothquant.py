"""SmoothQuant (Xiao et al., 2023): outlier channels of activations are divided by what the weights are multiplied with.

    x ─ Q ─ linear(W)     ⇒     x · 1/s ─ Q ─ linear(W · s),     s = max|x|^α / max|W|^(1-α) per input channel

α is searched for every group of linears that read one tensor, "none" included: the one with the least squared error of
the group's products, inputs and weights quantized, on samples of the calibration data. Inputs have one scale, or one
per token; where they have one per group they are searched as if they had one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from graphq.algorithms.base import ALGORITHMS, Run
from graphq.algorithms.samples import RowSamples
from graphq.algorithms.scaling import Group, groups, search_scales, weights
from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError
from graphq.graph.decision import decision_of
from graphq.numerics.affine import fake_quantize
from graphq.numerics.products import linear
from graphq.passes.placement import quantizer_at

ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 10))
CLIPS = (1.0, 0.9, 0.8, 0.65, 0.5)  # parts of the range that observers may choose
SMALLEST = 1e-5
ROWS = 512  # of every tensor


@ALGORITHMS.register("smoothquant")
def smoothquant(graphs: Sequence[fx.GraphModule], run: Run, *, alpha: float | Literal["search"] = "search") -> None:
    """alpha: how much of the difficulty moves from activations to weights, 0 to 1, or "search"."""
    if alpha != "search" and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
        raise ConfigError(f"alpha is a number from 0 to 1 or 'search', not {alpha!r}", where="smoothquant")
    every = [{g.name: g for g in groups(gm) if g.quantized} for gm in graphs]
    if not set.intersection(*map(set, every)):
        return

    def choose(group: Group, seen: RowSamples) -> Tensor | None:
        if alpha == "search":
            return _searched(graphs[0], group, seen)
        return _scale(seen.largest, _weights_largest(graphs[0], group), float(alpha))

    # of all tokens, also those of padding: the scale of the tensor is for them too
    search_scales(graphs, run, every, choose, label="smoothquant", most=ROWS, padding=True)


def _weights_largest(gm: fx.GraphModule, group: Group) -> Tensor:
    return torch.stack([w.abs().amax(0) for w in weights(gm, group)]).amax(0)


def _scale(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """[in], with geometric mean one."""
    scale = activations.clamp(min=SMALLEST).pow(alpha) / weights.clamp(min=SMALLEST).pow(1 - alpha)
    return (scale / scale.log().mean().exp()).clamp(min=SMALLEST)


def _searched(gm: fx.GraphModule, group: Group, seen: RowSamples) -> Tensor | None:
    """The best scale, or None where none is better than no scale."""
    own, largest = weights(gm, group), _weights_largest(gm, group)
    rows = seen.rows
    wanted = [linear(rows, w) for w in own]
    spec = quantizer_at(gm, group.readers[0]).spec
    specs = [decision_of(n).weight_spec for n in group.linears]  # type: ignore[union-attr]
    candidates = [torch.ones_like(largest), *(_scale(seen.largest, largest, a) for a in ALPHAS)]
    errors = []
    for scale in candidates:
        rounded = [_rounded_weight(w * scale, s) for w, s in zip(own, specs, strict=True)]
        clips = (1.0,) if spec.dynamic else CLIPS
        errors.append(min(_error(seen, scale, clip, spec, rounded, wanted) for clip in clips))
    best = int(torch.tensor(errors).argmin())
    return candidates[best] if best else None


def _error(
    seen: RowSamples, scale: Tensor, clip: float, spec: QuantSpec, weights: list[Tensor], wanted: list[Tensor]
) -> float:
    x = seen.rows / scale
    if spec.granularity == "token":
        qparams, block = spec.choose(x.amin(1, keepdim=True), x.amax(1, keepdim=True)), spec.block_for(2)
    else:
        qparams, block = spec.choose((seen.lowest / scale).min() * clip, (seen.highest / scale).max() * clip), ()
    x = fake_quantize(x, *qparams, block, spec.number_format)
    return sum((linear(x, w) - y).square().sum().item() for w, y in zip(weights, wanted, strict=True))


def _rounded_weight(weight: Tensor, spec: QuantSpec | None) -> Tensor:
    assert spec is not None
    block = spec.block_for(2)
    if spec.granularity not in ("tensor", "channel"):
        return weight
    largest = weight.abs().amax(1, keepdim=True) if block else weight.abs().max()
    scale, zero = spec.choose(-largest, largest)
    return fake_quantize(weight, scale, zero, block, spec.number_format, narrow_range=spec.narrow_range)
