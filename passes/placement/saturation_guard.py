"""Keep u8·s8 kernels from saturating on x86 without VNNI, at no cost in speed.

Which pairs of weights are safe: `graphq.numerics.pairs`. Each output channel gets the scale, between its own and the
one at which all pairs are safe, with the least squared error after unsafe pairs are clipped to the bound.

K runs as (kernel row, kernel column, input channel), whatever the layout of the model; some kernels fill up an odd
number of channels with a zero. Depthwise convolutions have another kernel, and need nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphq.graph.decision import decision_of
from graphq.graph.view import LayerView, parameter, set_parameter
from graphq.numerics.pairs import PAIR_LIMIT, along_k, from_k, heaviest_side, pairs_of

from .edges import quantizer_at, quantizer_calls

STEPS = 5


def guard_saturation(gm: fx.GraphModule) -> dict[str, float]:
    """Choose weight scales and codes that no input can saturate. Returns the mean growth of the scale per layer."""
    even = gm.meta["graphq_target"].even_channels if "graphq_target" in gm.meta else False
    growth: dict[str, float] = {}
    guarded: dict[fx.Node, float] = {}  # by the quantizer's call: a weight may have several readers
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if decision is None or decision.action != "quantize" or decision.weight is None or _is_depthwise(gm, node):
            continue
        _, call = quantizer_calls(decision)
        assert call is not None
        if call in guarded:
            decision.reason += _words(guarded[call])
            continue
        quantizer = quantizer_at(gm, call)
        weight = parameter(gm, decision.weight)
        if weight is None or not quantizer.spec.number_format.signed or quantizer.spec.number_format.bits < 8:
            continue
        filled = _even_channels(weight.detach()) if even else weight.detach()
        rows = along_k(filled)
        scale, _ = quantizer.qparams
        safe_rows, safe_scale = guard_rows(rows, scale.reshape(-1).expand(len(rows)), per_row=bool(quantizer.block))
        quantizer.scale = safe_scale.reshape(scale.shape) if quantizer.block else safe_scale[0]
        _replace(gm, decision.weight, call, from_k(safe_rows, filled.shape)[:, : weight.shape[1]])
        growth[node.name] = guarded[call] = (safe_scale / scale.reshape(-1)).mean().item()
        decision.reason += _words(growth[node.name])
    gm.recompile()
    return growth


def _even_channels(weight: Tensor) -> Tensor:
    """[out, in, …] with a zero channel where the number of input channels is odd."""
    return torch.cat([weight, torch.zeros_like(weight[:, :1])], 1) if weight.shape[1] % 2 else weight


def _words(growth: float) -> str:
    return f"; scale grown {growth:.2f}× against int16 saturation"


def guard_rows(rows: Tensor, scale: Tensor, *, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """rows [out, K] of weights, scale [out] → (weights on the safe grid [out, K], scale [out])."""
    rows = rows.float()
    full = _safe_scale(rows, scale)
    full = full if per_row else full.max().expand_as(full)
    best, best_scale = torch.zeros_like(rows), scale.clone()
    least = torch.full_like(scale, float("inf"))
    for step in torch.linspace(0, 1, STEPS):
        trial = torch.lerp(scale, full, step)
        values = clip_pairs(torch.round(rows / trial[:, None])) * trial[:, None]
        loss = (values - rows).square().sum(1)
        better = loss < least if per_row else (loss.sum() < least.sum()).expand_as(loss)
        least, best_scale = torch.where(better, loss, least), torch.where(better, trial, best_scale)
        best = torch.where(better[:, None], values, best)
    return best, best_scale


def clip_pairs(codes: Tensor) -> Tensor:
    """Codes [out, K], integers in float: both of an unsafe pair give up half of the excess."""
    k = codes.shape[1]
    pairs = pairs_of(codes.clamp(-127, 127))
    for sign in (1, -1):
        excess = ((pairs * sign).clamp(min=0).sum(-1) - PAIR_LIMIT).clamp(min=0)
        cut = torch.stack([torch.ceil(excess / 2), torch.floor(excess / 2)], dim=-1)
        pairs = pairs - sign * cut
    return pairs.flatten(1)[:, :k]


def _safe_scale(rows: Tensor, scale: Tensor) -> Tensor:
    """The smallest scale [out] at which every pair of real-valued codes is safe, never below the given one."""
    return torch.maximum(scale, heaviest_side(rows).amax(1) / PAIR_LIMIT)


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
