"""Keep u8·s8 kernels from saturating on x86 without VNNI, at no cost in speed.

Which pairs of weights are safe: `graphq.numerics.pairs`. Each output channel gets the scale, between its own and the
one at which all pairs are safe, with the least squared error after unsafe pairs are clipped to the bound.

Most input channels never come near code 255. Where the target asks for it, pairs are safe only up to MARGIN times the
largest value that calibration saw of each, and for no less than a quarter of the codes.

K runs as (kernel row, kernel column, input channel), whatever the layout of the model; some kernels fill up an odd
number of channels with a zero. Depthwise convolutions have another kernel, and need nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from graphq.graph.decision import Decision, decision_of
from graphq.graph.recurrent_ops import LSTM
from graphq.graph.view import LayerView, parameter, set_parameter
from graphq.numerics.pairs import PAIR_LIMIT, along_k, from_k, heaviest_side, pairs_of
from graphq.observers.maximum import ChannelMaximum

from .edges import channels_read, quantizer_at, quantizer_calls

STEPS = 5
MARGIN, LEAST = 1.25, 0.25
Maxima = dict[tuple[fx.Node, int], ChannelMaximum]  # by the tensor that is read and the axis of its channels


def maxima_watchers(gm: fx.GraphModule) -> Maxima:
    """A watcher for the input of every op whose weight is guarded."""
    static = [(n, d) for n, d in _guarded(gm) if not _finds_scales(gm, d)]
    return {key: ChannelMaximum(key[1]) for key in (channels_read(gm, n, d) for n, d in static)}


def _finds_scales(gm: fx.GraphModule, decision: Decision) -> bool:
    """Are the scales of its inputs found at run time? Then codes reach as far as they can, whatever calibration saw."""
    return bool(quantizer_at(gm, quantizer_calls(decision)[0][0]).spec.dynamic)


def guard_saturation(gm: fx.GraphModule, maxima: Maxima | None = None) -> dict[str, float]:
    """Choose weight scales and codes that do not saturate. Returns the mean growth of the scale per layer.

    maxima: what calibration saw of the inputs; None: safe for every input.
    """
    even = gm.meta["graphq_target"].even_channels if "graphq_target" in gm.meta else False
    growth: dict[str, float] = {}
    guarded: dict[fx.Node, float] = {}  # by the quantizer's call: a weight may have several readers
    for node, decision in list(_guarded(gm)):
        _, call = quantizer_calls(decision)
        assert call is not None and decision.weight is not None
        if call in guarded:
            decision.reason += _words(guarded[call])
            continue
        quantizer = quantizer_at(gm, call)
        weight = parameter(gm, decision.weight)
        if weight is None or not quantizer.spec.number_format.signed or quantizer.spec.number_format.bits < 8:
            continue
        filled = _even_channels(weight.detach()) if even else weight.detach()
        rows, reach = along_k(filled), _reach(gm, node, decision, filled.shape, maxima or {})
        scale, _ = quantizer.qparams
        old = scale.reshape(-1).expand(len(rows))
        safe_rows, safe_scale = guard_rows(rows, old, reach, per_row=bool(quantizer.block))
        quantizer.scale = safe_scale.reshape(scale.shape) if quantizer.block else safe_scale[0]
        _replace(gm, decision.weight, call, from_k(safe_rows, filled.shape)[:, : weight.shape[1]])
        growth[node.name] = guarded[call] = (safe_scale / scale.reshape(-1)).mean().item()
        decision.reason += _words(growth[node.name])
    gm.recompile()
    return growth


def _guarded(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Decision]]:
    for node in gm.graph.nodes:
        decision = decision_of(node)
        asked = decision is not None and decision.action == "quantize" and decision.weight is not None
        if asked and node.target is not LSTM and not _is_depthwise(gm, node):  # LSTM's weights are unsigned codes
            yield node, decision  # type: ignore[misc]


def _reach(gm: fx.GraphModule, node: fx.Node, decision: Decision, shape: torch.Size, maxima: Maxima) -> Tensor | None:
    """How far the codes of the inputs go, as a share of 255 [out, K] for a weight of that shape."""
    seen = maxima.get(channels_read(gm, node, decision))
    if seen is None or seen.largest is None or _finds_scales(gm, decision):
        return None
    scale, zero = quantizer_at(gm, quantizer_calls(decision)[0][0]).qparams
    codes = zero + MARGIN * (seen.largest / scale).clamp(min=0)  # padding has the code of zero
    share = (codes / 255).clamp(LEAST, 1)
    weight = parameter(gm, decision.weight)
    assert weight is not None
    groups = len(share) // weight.shape[1]
    by_group = torch.nn.functional.pad(share.reshape(groups, -1), [0, shape[1] - len(share) // groups], value=1.0)
    positions = math.prod(shape[2:])
    return by_group.repeat(1, positions).repeat_interleave(shape[0] // groups, 0)


def _even_channels(weight: Tensor) -> Tensor:
    """[out, in, …] with a zero channel where the number of input channels is odd."""
    return torch.cat([weight, torch.zeros_like(weight[:, :1])], 1) if weight.shape[1] % 2 else weight


def _words(growth: float) -> str:
    return f"; scale grown {growth:.2f}× ({math.log2(growth):.2f} bits) against int16 saturation"


def guard_rows(
    rows: Tensor, scale: Tensor, reach: Tensor | None = None, *, per_row: bool = True
) -> tuple[Tensor, Tensor]:
    """rows [out, K] of weights, scale [out] → (weights on the safe grid [out, K], scale [out]). reach: see
    `heaviest_side`."""
    rows = rows.float()
    reach = torch.ones_like(rows) if reach is None else reach
    full = torch.maximum(scale, heaviest_side(rows, reach).amax(1) / PAIR_LIMIT)
    full = full if per_row else full.max().expand_as(full)
    best, best_scale = torch.zeros_like(rows), scale.clone()
    least = torch.full_like(scale, float("inf"))
    for step in torch.linspace(0, 1, STEPS):
        trial = torch.lerp(scale, full, step)
        values = clip_pairs(torch.round(rows / trial[:, None]), reach) * trial[:, None]
        loss = (values - rows).square().sum(1)
        better = loss < least if per_row else (loss.sum() < least.sum()).expand_as(loss)
        least, best_scale = torch.where(better, loss, least), torch.where(better, trial, best_scale)
        best = torch.where(better[:, None], values, best)
    return best, best_scale


def clip_pairs(codes: Tensor, reach: Tensor) -> Tensor:
    """Codes [out, K], integers in float: both of an unsafe pair give up of the excess as their inputs reach."""
    k = codes.shape[1]
    pairs, (p, q) = pairs_of(codes.clamp(-127, 127)), pairs_of(reach).unbind(-1)
    for sign in (1, -1):
        excess = ((pairs * sign).clamp(min=0) * torch.stack([p, q], -1)).sum(-1) - PAIR_LIMIT
        first = torch.ceil(excess.clamp(min=0) * p / (p.square() + q.square()))
        second = torch.ceil((excess - first * p).clamp(min=0) / q.clamp(min=LEAST))
        pairs = pairs - sign * torch.stack([first, second], -1)
    return pairs.flatten(1)[:, :k]


def _is_depthwise(gm: fx.GraphModule, node: fx.Node) -> bool:
    view = LayerView(gm, node)
    groups = view.arg("groups") if view.family == "conv" else 1
    return groups > 1 and view.shape[1] == groups and LayerView(gm, node.args[0]).shape[1] == groups  # type: ignore[arg-type]


def _replace(gm: fx.GraphModule, old: fx.Node, call: fx.Node, tensor: Tensor) -> None:
    """Feed the quantizer from a new parameter; the model's own stays as it is."""
    name = set_parameter(gm, f"{old.target}_guarded", tensor)
    with gm.graph.inserting_before(call):
        new = gm.graph.get_attr(name)
    new.meta = {**old.meta, "val": tensor}
    call.args = (new,)
    for user in call.users:
        decision = decision_of(user)
        if decision is not None and decision.weight is old:
            decision.weight = new
