"""Bias correction: what rounding the weights adds to a layer's mean output is taken off its bias.

A layer computes (W + E)·x + b with the rounding error E of its weights, which is off by E·mean(x) on average. After a
relu the mean of x is most of x, and so most of the error goes (Nagel et al., 2019, "Data-Free Quantization Through
Weight Equalization and Bias Correction"; here the mean comes from the calibration data). A weight that an algorithm has
chosen to make good what its inputs have lost (QEP, GPTAQ, AutoRound) keeps its bias: the correction would undo that.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from graphq.graph.decision import Decision, decision_of
from graphq.graph.view import LayerView, parameter, set_parameter
from graphq.observers.mean import ChannelMean
from graphq.observers.tokens import MaskWatchers, masks_for

from .edges import channels_read, quantizer_at, quantizer_calls

Watchers = dict[tuple[fx.Node, int], ChannelMean]  # by the tensor that is read and the axis of its channels


def mean_watchers(gm: fx.GraphModule, masks: MaskWatchers = ()) -> Watchers:
    """A watcher for the input of every op whose bias can be corrected. masks: see `ChannelMean`."""
    keys = dict.fromkeys(channels_read(gm, n, d) for n, d in _correctable(gm))
    return {key: ChannelMean(key[1], masks=masks_for(key[0], masks)) for key in keys}


def mean_products(gm: fx.GraphModule, watchers: Watchers, *, original: bool = False) -> dict[str, Tensor]:
    """weight · mean input [out] by op, with the weight as it is now: fake-quantized once calibration has frozen it.
    original: with the one that an algorithm found, where one has chosen its values."""
    products = {}
    for node, decision in _correctable(gm):
        mean = watchers[channels_read(gm, node, decision)].mean
        _, call = quantizer_calls(decision)
        weight = parameter(gm, decision.weight)
        if mean is not None and call is not None and weight is not None:
            chosen = original and decision.original is not None
            values = decision.original if chosen else quantizer_at(gm, call)(weight.detach())
            products[node.name] = _product(LayerView(gm, node), values, mean)  # type: ignore[arg-type]
    return products


def correct_bias(gm: fx.GraphModule, watchers: Watchers, wanted: dict[str, Tensor]) -> None:
    """Shift biases so that the mean output is what `wanted`, the products of the float weights, gave."""
    found = mean_products(gm, watchers)
    for node, decision in list(_correctable(gm)):
        if node.name not in found:
            continue
        old = decision.bias
        bias = parameter(gm, old)
        assert old is not None and bias is not None
        corrected = (bias.detach().double() + wanted[node.name] - found[node.name]).to(bias.dtype)
        with gm.graph.inserting_before(node):
            new = gm.graph.get_attr(set_parameter(gm, f"{old.target}_corrected", corrected))
        new.meta = {**old.meta, "val": corrected}
        node.replace_input_with(old, new)
        decision.bias = new
        decision.reason += "; bias corrected"
    for _, decision in _biased(gm):
        if _compensates(gm, decision):
            decision.reason += "; bias left as it is: the weight makes good what its inputs have lost"
    gm.recompile()


def _correctable(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Decision]]:
    return ((node, decision) for node, decision in _biased(gm) if not _compensates(gm, decision))


def _biased(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Decision]]:
    """Quantized ops with a weight and a bias."""
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if decision is None or decision.action != "quantize" or parameter(gm, decision.bias) is None:
            continue
        if LayerView(gm, node).family in ("conv", "linear"):
            yield node, decision


def _compensates(gm: fx.GraphModule, decision: Decision) -> bool:
    """Its weight was chosen so that mean outputs are those of the float model, whatever its inputs have lost."""
    _, call = quantizer_calls(decision)
    return call is not None and quantizer_at(gm, call).settled and decision.original is None


def _product(view: LayerView, weight: Tensor, mean: Tensor) -> Tensor:
    """weight [out, in / groups, …] · mean [in], summed over kernel positions → [out], float64."""
    rows = weight.double().flatten(2).sum(-1) if weight.ndim > 2 else weight.double()
    groups = view.arg("groups") if view.family == "conv" else 1
    by_group = rows.unflatten(0, (groups, -1))  # [groups, out / groups, in / groups]
    return torch.einsum("goi,gi->go", by_group, mean.reshape(groups, -1)).reshape(-1)
