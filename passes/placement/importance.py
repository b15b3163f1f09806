"""Importance of the columns of a weight: E[x²] of the input channels that they meet, from the calibration data.

An error e in a weight adds e·x to the output, so that errors where inputs are large cost most (the importance matrix of
llama.cpp; llm-compressor's `imatrix_mse`).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphq.errors import CalibrationError
from graphq.graph.decision import decision_of
from graphq.graph.view import LayerView, parameter
from graphq.observers.mean import ChannelMean
from graphq.observers.mse_grid import WeightedMseGrid
from graphq.observers.tokens import MaskWatchers, masks_for

from .edges import quantizer_at, quantizer_calls

FAMILIES = ("conv", "conv_transpose", "linear")
Watchers = dict[tuple[fx.Node, int], ChannelMean]  # by the tensor that is read and the axis of its channels


def importance_watchers(gm: fx.GraphModule, masks: MaskWatchers = ()) -> Watchers:
    """A watcher for the input of every op whose weight's range is found with importance. masks: see `ChannelMean`."""
    keys = {(source, _axis(view, weight)) for view, source, weight, _ in _weighted(gm)}
    return {(source, axis): ChannelMean(axis, power=2, masks=masks_for(source, masks)) for source, axis in sorted(keys)}


def _axis(view: LayerView, weight: Tensor) -> int:
    """The axis of the input channels, counted from the end: inputs may come without a batch."""
    return -1 if view.family == "linear" else 1 - weight.ndim


def give_importance(gm: fx.GraphModule, watchers: Watchers) -> None:
    """Tell the observers of weights what was seen of the inputs: of all of them, where a weight is tied."""
    for view, source, weight, observer in _weighted(gm):
        seen = watchers[source, _axis(view, weight)].mean
        if seen is None:
            raise CalibrationError(
                "no calibration data reaches this layer, so that nothing is known of its inputs",
                where=view.where(),
                remedy="Give data that runs it, or choose the observer mse_grid.",
            )
        watcher = watchers[source, _axis(view, weight)]
        total = _on_weight(view, weight, (seen * watcher.count).float())
        observer.importance = total if observer.importance is None else observer.importance + total


def _weighted(gm: fx.GraphModule) -> list[tuple[LayerView, fx.Node, Tensor, WeightedMseGrid]]:
    """(op, the tensor that it reads, its weight and the observer of that)."""
    found = []
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if decision is None or decision.weight is None:
            continue
        _, call = quantizer_calls(decision)
        quantizer = quantizer_at(gm, call) if call is not None else None
        observer = quantizer.observer if quantizer is not None and not quantizer.settled else None
        weight = parameter(gm, decision.weight) if isinstance(observer, WeightedMseGrid) else None
        if weight is None or not isinstance(observer, WeightedMseGrid):
            continue
        view = LayerView(gm, node)
        if view.family not in FAMILIES:
            raise CalibrationError(
                f"the observer imatrix_mse knows the inputs of convolutions and linears, not of {view.family}",
                where=view.where(),
                remedy="Choose the observer mse_grid for it.",
            )
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.op == "call_module" and parameter(gm, source) is None:
            source = source.args[0]  # type: ignore[assignment]
        found.append((view, source, weight, observer))
    return found


def _on_weight(view: LayerView, weight: Tensor, importance: Tensor) -> Tensor:
    """[in] in a shape that goes with the weight: [1 or out, in / groups, 1, …], or [in, 1, …] of a transposed one."""
    if view.family == "conv_transpose":
        return importance.reshape(-1, *[1] * (weight.ndim - 1))
    groups = view.arg("groups") if view.family == "conv" else 1
    rows = importance.reshape(groups, -1)
    if groups > 1:
        rows = torch.repeat_interleave(rows, weight.shape[0] // groups, dim=0)
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
