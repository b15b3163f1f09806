"""Cross-layer equalization (Nagel et al., 2019): two layers share the range of each channel between them evenly.

    W1 ─ relu ─ W2     ⇒     W1 / s ─ relu ─ W2 · s,     s = sqrt(r1 / r2) per channel

r1: largest magnitude of a row of W1 (its bias is divided too), r2: of the input channel of W2 that it feeds. Pairs are
found in the graph: convolutions and linears with quantized weights of their own, the second the only reader of the
first, with nothing between them but ops that a positive scale passes through. A channel whose bias would come to reach
further than those of all others is scaled less. Chains (a depthwise convolution between two others) are gone through
until nothing moves any more. relu6 keeps no scale, and is where a pair ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphq.algorithms.absorption import shifts
from graphq.algorithms.base import ALGORITHMS, Run, mark_rescaled, replace_read
from graphq.algorithms.layers import Layer, by_input
from graphq.errors import ConfigError
from graphq.graph.optable import family_of
from graphq.graph.passes import finish
from graphq.graph.view import parameter
from graphq.passes.placement import quantizer_at

RELUS = ("relu", "leaky_relu")
PASSES = {"conv": (*RELUS, "max_pool", "avg_pool"), "linear": RELUS}  # a pool behind a linear mixes channels
NAME = "equalization"
DEAD = 1e-6  # of the largest range: such channels are left alone
STILL = 1e-3  # change of a scale, relative
Pair = tuple[str, str]  # names of the two nodes


@ALGORITHMS.register(NAME)
def equalization(graphs: Sequence[fx.GraphModule], run: Run, *, sweeps: int = 50, absorb: bool = False) -> None:
    """sweeps: over all pairs, at most. absorb: move what channels hardly fall below into the next bias, see
    `graphq.algorithms.absorption`."""
    if sweeps < 1:
        raise ConfigError(f"at least one sweep, not {sweeps}", where=NAME)
    layers = [_layers(gm) for gm in graphs]
    every = [_pairs(gm, known) for gm, known in zip(graphs, layers, strict=True)]
    pairs = [p for p in every[0] if all(p in others for others in every)]
    if not pairs:
        raise ConfigError(
            "no two layers follow each other with nothing but a relu or a pool between them",
            where=NAME,
            remedy="Leave it out: relu6, norms and sums between layers keep no scale of channels.",
        )
    absorbed = shifts(run, [[(known[a], known[b]) for a, b in pairs] for known in layers]) if absorb else {}
    for known in layers:  # first: a bias holds the scale of its channel back
        for first, second in pairs:
            if first in absorbed:
                _absorb(known[first], known[second], absorbed[first])
    scales = _scales(layers[0], pairs, sweeps)
    for gm, known in zip(graphs, layers, strict=True):
        for first, second in pairs:
            _divide_rows(known[first], scales[first, second])
            _multiply_columns(known[second], scales[first, second])
            mark_rescaled(gm, known[first].node, [known[second].node])
        finish(gm)


def _layers(gm: fx.GraphModule) -> dict[str, Layer]:
    every = [layer for layers in by_input(gm)[0].values() for layer in layers]
    return {layer.node.name: layer for layer in every if layer.view.family in ("conv", "linear")}


def _pairs(gm: fx.GraphModule, layers: dict[str, Layer]) -> list[Pair]:
    """In the order of the graph."""
    before = {name: _before(gm, layer, layers) for name, layer in layers.items()}
    return [(first, second) for second, first in before.items() if first is not None]


def _before(gm: fx.GraphModule, layer: Layer, layers: dict[str, Layer]) -> str | None:
    """The layer that alone makes what this one alone reads."""
    node, family = layer.node.args[0], layer.view.family
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.name in layers:
            first = layers[node.name]
            return node.name if first.view.family == family and _bias_is_own(first) else None
        known_range = node.op == "call_module" and quantizer_at(gm, node).spec.observer == "fixed"
        if known_range or (node.op != "call_module" and family_of(node.target) not in PASSES[family]):
            return None
        node = node.args[0]
    return None


def _bias_is_own(layer: Layer) -> bool:
    bias = layer.view.arg("bias")
    return bias is None or (parameter(layer.view.gm, bias) is not None and len(bias.users) == 1)


def _scales(layers: dict[str, Layer], pairs: list[Pair], sweeps: int) -> dict[Pair, Tensor]:
    """What rows of the first are divided by and columns of the second multiplied with, [channels] for every pair."""
    weights = {name: layers[name].weight.float() for pair in pairs for name in pair}
    biases = {first: _bias(layers[first]) for first, _ in pairs}
    scales = {pair: torch.ones(len(weights[pair[0]]), device=weights[pair[0]].device) for pair in pairs}
    for _ in range(sweeps):
        moved = 0.0
        for pair in pairs:
            first, second = pair
            rows = weights[first].abs().flatten(1).amax(1)
            columns = _by_input(weights[second], len(rows)).abs().amax((1, 3)).flatten()
            alive = (rows > DEAD * rows.max()) & (columns > DEAD * columns.max())
            reach = biases[first] + rows  # no channel may come to reach further than the furthest did, by its bias
            scale = torch.maximum((rows / columns).sqrt(), biases[first] / reach.max().clamp(min=1e-30))
            scale = torch.where(alive, scale, torch.ones_like(rows))
            biases[first] = biases[first] / scale
            weights[first] = _rows_divided(weights[first], scale)
            weights[second] = _columns_multiplied(weights[second], scale)
            scales[pair] = scales[pair] * scale
            moved = max(moved, float(scale.log().abs().max()))
        if moved < STILL:
            break
    return scales


def _bias(layer: Layer) -> Tensor:
    """Magnitudes [out]."""
    bias = layer.view.arg("bias")
    tensor = parameter(layer.view.gm, bias) if bias is not None else None
    return (
        torch.zeros_like(layer.weight[:, :1].flatten(1)[:, 0].float())
        if tensor is None
        else tensor.detach().abs().float()
    )


def _by_input(weight: Tensor, channels: int) -> Tensor:
    """[groups, out / groups, in / groups, positions] of a weight that reads so many channels."""
    groups = channels // weight.shape[1]
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def _rows_divided(weight: Tensor, scale: Tensor) -> Tensor:
    return weight / scale.reshape(-1, *[1] * (weight.ndim - 1))


def _columns_multiplied(weight: Tensor, scale: Tensor) -> Tensor:
    parts = _by_input(weight, len(scale))
    return (parts * scale.reshape(len(parts), 1, -1, 1)).reshape(weight.shape)


def _divide_rows(layer: Layer, scale: Tensor) -> None:
    _set_weight(layer, _rows_divided(layer.weight, scale))
    tensor = parameter(layer.view.gm, layer.view.arg("bias"))
    if tensor is not None:
        _set_bias(layer, tensor.detach() / scale)


def _multiply_columns(layer: Layer, scale: Tensor) -> None:
    _set_weight(layer, _columns_multiplied(layer.weight, scale))
    layer.decision.reason += f"; equalized with what makes its input, by {scale.min():.2g} to {scale.max():.2g}"


def _absorb(first: Layer, second: Layer, shift: Tensor) -> None:
    before, after = (parameter(layer.view.gm, layer.view.arg("bias")) for layer in (first, second))
    assert before is not None and after is not None
    _set_bias(first, before.detach() - shift)
    _set_bias(second, after.detach() + _columns_multiplied(second.weight, shift).flatten(1).sum(1))
    first.decision.reason += f"; {int(shift.count_nonzero())} channels less by what they hardly fall below"


def _set_bias(layer: Layer, bias: Tensor) -> None:
    old = layer.view.arg("bias")
    new = replace_read(layer.view.gm, old, layer.node, bias.to(old.meta["val"].dtype), NAME)
    if layer.decision.bias is old:
        layer.decision.bias = new


def _set_weight(layer: Layer, weight: Tensor) -> None:
    decision = layer.decision
    assert decision.weight is not None
    decision.weight = replace_read(layer.view.gm, decision.weight, layer.call, weight.to(layer.weight.dtype), NAME)
