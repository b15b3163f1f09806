"""SmoothQuant (Xiao et al., 2023): outlier channels of activations are divided by what the weights are multiplied with.

    x ─ Q ─ linear(W)     ⇒     x · 1/s ─ Q ─ linear(W · s),     s = max|x|^α / max|W|^(1-α) per input channel

The linears that read one tensor (q, k, v; gate, up) are a group with one s. It is folded into the norm that makes the
tensor where nothing else reads it, and is a multiplication else (a residual stream that starts behind the norm, as in
BERT). α is searched for every group, "none" included: the one with the least squared error of the group's products,
inputs and weights quantized, on samples of the calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from graphq.algorithms.base import ALGORITHMS, Run, replace_read
from graphq.algorithms.samples import RowSamples
from graphq.config.spec import QuantSpec
from graphq.errors import ConfigError
from graphq.graph.decision import KEY as DECISION
from graphq.graph.decision import Decision, decision_of
from graphq.graph.optable import family_of
from graphq.graph.passes import finish
from graphq.graph.view import LayerView, parameter, set_parameter
from graphq.numerics.affine import fake_quantize
from graphq.passes.placement import quantizer_at, quantizer_calls

SMOOTHED = "graphq_smoothed"  # in a graph's meta: the groups that got a scale, so that `load` can make them again
ALPHAS = tuple(round(0.1 * i, 1) for i in range(1, 10))
CLIPS = (1.0, 0.9, 0.8, 0.65, 0.5)  # parts of the range that observers may choose
SMALLEST = 1e-5
NORMS = ("layer_norm", "rms_norm")


@dataclass
class Group:
    """Linears that read one tensor through one quantizer. source: the tensor; call: the call that quantizes it."""

    source: fx.Node
    call: fx.Node
    linears: list[fx.Node]


@ALGORITHMS.register("smoothquant")
def smoothquant(graphs: Sequence[fx.GraphModule], run: Run, *, alpha: float | Literal["search"] = "search") -> None:
    """alpha: how much of the difficulty moves from activations to weights, 0 to 1, or "search"."""
    if alpha != "search" and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
        raise ConfigError(f"alpha is a number from 0 to 1 or 'search', not {alpha!r}", where="smoothquant")
    if any(SMOOTHED in gm.meta for gm in graphs):
        return  # by a calibration that failed later on: the function is the same, the scales are as good
    every = [{g.source.name: g for g in groups(gm)} for gm in graphs]
    first = graphs[0]
    found = {name: g for name, g in every[0].items() if all(name in others for others in every)}
    seen = {name: RowSamples() for name in found}
    if not found:
        return
    run([(g.source, seen[name]) for name, g in found.items()])
    scales = {}
    for name, group in found.items():
        if not seen[name].count:
            continue
        if alpha == "search":
            scale = _searched(first, group, seen[name])
        else:
            scale = _scale(seen[name].largest, _weights_largest(first, group), float(alpha))
        if scale is not None:
            scales[name] = scale
    folds = {
        name: all(_folds(gm, g[name], s) for gm, g in zip(graphs, every, strict=True)) for name, s in scales.items()
    }
    for gm, named in zip(graphs, every, strict=True):
        for name, scale in scales.items():
            apply_scale(gm, named[name], scale, fold=folds[name])
        gm.meta[SMOOTHED] = [[name, folds[name]] for name in scales]
        finish(gm)


def place_scales(gm: fx.GraphModule, smoothed: Sequence[tuple[str, bool]]) -> None:
    """Scales of one for the groups of these tensors, folded or not: their values come from a file."""
    found = {g.source.name: g for g in groups(gm)}
    for name, fold in smoothed:
        if name in found:
            apply_scale(gm, found[name], torch.ones_like(_weights(gm, found[name])[0][0]), fold=fold)
    if smoothed:
        gm.meta[SMOOTHED] = [list(s) for s in smoothed]
        finish(gm)


def groups(gm: fx.GraphModule) -> list[Group]:
    """Quantized tensors that only linears with weights of their own read."""
    found = []
    for call in gm.graph.nodes:
        if call.op != "call_module" or parameter(gm, call.all_input_nodes[0]) is not None:
            continue
        if quantizer_at(gm, call).constant or not call.users:
            continue
        if all(_smoothable(gm, user, call) for user in call.users):
            found.append(Group(call.all_input_nodes[0], call, list(call.users)))
    return found


def _smoothable(gm: fx.GraphModule, node: fx.Node, call: fx.Node) -> bool:
    decision = decision_of(node)
    if family_of(node.target) != "linear" or decision is None or decision.action != "quantize":
        return False
    _, weight = quantizer_calls(decision)
    return weight is not None and len(weight.users) == 1 and node.args[0] is call


def _weights(gm: fx.GraphModule, group: Group) -> list[Tensor]:
    tensors = [parameter(gm, decision_of(n).weight) for n in group.linears]  # type: ignore[union-attr]
    return [t.detach() for t in tensors if t is not None]


def _weights_largest(gm: fx.GraphModule, group: Group) -> Tensor:
    return torch.stack([w.abs().amax(0) for w in _weights(gm, group)]).amax(0)


def _scale(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """[in], with geometric mean one."""
    scale = activations.clamp(min=SMALLEST).pow(alpha) / weights.clamp(min=SMALLEST).pow(1 - alpha)
    return (scale / scale.log().mean().exp()).clamp(min=SMALLEST)


def _searched(gm: fx.GraphModule, group: Group, seen: RowSamples) -> Tensor | None:
    """The best scale, or None where none is better than no scale."""
    weights, largest = _weights(gm, group), _weights_largest(gm, group)
    rows = seen.rows
    wanted = [rows @ w.T for w in weights]
    spec = quantizer_at(gm, group.call).spec
    specs = [decision_of(n).weight_spec for n in group.linears]  # type: ignore[union-attr]
    candidates = [torch.ones_like(largest), *(_scale(seen.largest, largest, a) for a in ALPHAS)]
    errors = []
    for scale in candidates:
        rounded = [_rounded_weight(w * scale, s) for w, s in zip(weights, specs, strict=True)]
        errors.append(min(_error(seen, scale, clip, spec, rounded, wanted) for clip in CLIPS))
    best = int(torch.tensor(errors).argmin())
    return candidates[best] if best else None


def _error(
    seen: RowSamples, scale: Tensor, clip: float, spec: QuantSpec, weights: list[Tensor], wanted: list[Tensor]
) -> float:
    lo, hi = (seen.lowest / scale).min() * clip, (seen.highest / scale).max() * clip
    x = fake_quantize(seen.rows / scale, *spec.choose(lo, hi), (), spec.number_format)
    return sum((x @ w.T - y).square().sum().item() for w, y in zip(weights, wanted, strict=True))


def _rounded_weight(weight: Tensor, spec: QuantSpec | None) -> Tensor:
    assert spec is not None
    block = spec.block_for(2)
    if spec.granularity not in ("tensor", "channel"):
        return weight
    largest = weight.abs().amax(1, keepdim=True) if block else weight.abs().max()
    scale, zero = spec.choose(-largest, largest)
    return fake_quantize(weight, scale, zero, block, spec.number_format, narrow_range=spec.narrow_range)


def apply_scale(gm: fx.GraphModule, group: Group, scale: Tensor, *, fold: bool) -> None:
    """Divide the tensor by the scale [in], in its norm or by a multiplication, and multiply the weights by it."""
    for node in group.linears:
        decision = decision_of(node)
        assert decision is not None and decision.weight is not None
        weight, (_, call) = parameter(gm, decision.weight), quantizer_calls(decision)
        assert weight is not None and call is not None
        decision.weight = replace_read(gm, decision.weight, call, weight.detach() * scale, "smoothed")
        decision.reason += "; smoothed"
    if fold:
        _fold(gm, group, scale)
    else:
        _multiply(gm, group, 1 / scale)


def _folds(gm: fx.GraphModule, group: Group, scale: Tensor) -> bool:
    """Is the tensor made by a norm with a weight that can take the scale in, and read by nothing but the group?"""
    norm = group.source
    if family_of(norm.target) not in NORMS or len(norm.users) > 1:
        return False
    tensors = [parameter(gm, r) for r in _norm_reads(gm, norm)]
    has_weight = LayerView(gm, norm).arg("weight") is not None
    return has_weight and all(t is not None and t.shape == scale.shape for t in tensors)


def _norm_reads(gm: fx.GraphModule, norm: fx.Node) -> list[fx.Node]:
    view = LayerView(gm, norm)
    return [r for r in (view.arg("weight"), view.arg("bias")) if r is not None]


def _fold(gm: fx.GraphModule, group: Group, scale: Tensor) -> None:
    """Divide weight and bias of the norm."""
    for read in _norm_reads(gm, group.source):
        tensor = parameter(gm, read)
        assert tensor is not None
        replace_read(gm, read, group.source, tensor.detach() / scale, "smoothed")


def _multiply(gm: fx.GraphModule, group: Group, factor: Tensor) -> None:
    base = str(decision_of(group.linears[0]).weight.target).rpartition(".")[0]  # type: ignore[union-attr]
    name = f"{base}.smoothing" if base else "smoothing"
    with gm.graph.inserting_before(group.call):
        read = gm.graph.get_attr(set_parameter(gm, name, factor))
        made = (group.source, read)  # named after its source: in the graphs of several targets it is the same tensor
        product = gm.graph.create_node(
            "call_function", torch.ops.aten.mul.Tensor, made, name=f"{group.source.name}_smoothed"
        )
    read.meta = {"val": factor}
    product.meta = {k: v for k, v in group.source.meta.items() if k in ("val", "nn_module_stack")}
    product.meta[DECISION] = Decision("float", "divides by the scales of smoothquant", rule="algorithm smoothquant")
    group.call.args = (product,)
    for node in group.linears:
        decision = decision_of(node)
        assert decision is not None
        decision.inputs = {product if k is group.source else k: v for k, v in decision.inputs.items()}
