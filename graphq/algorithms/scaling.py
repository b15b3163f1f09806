"""Scales per channel that move from a tensor into the weights that read it: what SmoothQuant and AWQ search for.

    x ─ linear(W)     ⇒     x · 1/s ─ linear(W · s)

The linears that read one tensor (q, k, v; gate, up) are a group with one s. 1/s is folded into what makes the tensor
where nothing else reads it: a norm, the linear behind one side of a product (up in down(act(gate) · up)) or in front of
a relu, that of v behind attention (heads that share one of v share its scales). Else it is a multiplication (a residual
stream that starts behind the norm, as in BERT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphq.algorithms.base import Run, expect_data, mark_rescaled, replace_read
from graphq.algorithms.makers import WORD, Maker, made_by
from graphq.algorithms.samples import RowSamples, rows_of
from graphq.graph.decision import KEY as DECISION
from graphq.graph.decision import Decision, decision_of
from graphq.graph.devices import device_of
from graphq.graph.garbage import give_back
from graphq.graph.on_disk import digest_of, scaled, values_of
from graphq.graph.optable import family_of
from graphq.graph.passes import finish
from graphq.graph.view import LayerView, held, parameter, set_parameter
from graphq.passes.placement import quantizer_at, quantizer_calls

FACTORS = "smoothing"  # the name of a scale that stands between two ops
SMOOTHED = "graphq_smoothed"  # in a graph's meta: the groups that got a scale, so that `load` can make them again
SEARCHED = ("smoothquant", "awq")  # what searches them


@dataclass
class Group:
    """Linears that read one tensor. readers: what reads it for them: its quantizer's call, or the linears."""

    source: fx.Node
    readers: list[fx.Node]
    linears: list[fx.Node]

    @property
    def name(self) -> str:
        """The same in the graphs of several targets; a tensor may be read quantized and not."""
        return self.source.name if self.quantized else f"{self.source.name}.float"

    @property
    def quantized(self) -> bool:
        """Is the tensor quantized for them?"""
        return self.readers[0].op == "call_module"


def groups(gm: fx.GraphModule) -> list[Group]:
    """Linears with quantized weights of their own, by the tensor that they read; those of a quantized tensor only where
    all its readers are such linears."""
    found = []
    for node in list(gm.graph.nodes):
        if node.op == "call_module":
            if held(gm, node.all_input_nodes[0]) is not None or quantizer_at(gm, node).constant or not node.users:
                continue
            if all(_scalable(gm, user, node) for user in node.users):
                found.append(Group(node.all_input_nodes[0], [node], list(node.users)))
            continue
        linears = [user for user in node.users if _scalable(gm, user, node)]
        if linears:
            found.append(Group(node, linears, linears))
    return found


def _scalable(gm: fx.GraphModule, node: fx.Node, source: fx.Node) -> bool:
    decision = decision_of(node)
    if family_of(node.target) != "linear" or decision is None or decision.weight_spec is None:
        return False
    _, call = quantizer_calls(decision)
    own = call is not None and len(call.users) == 1 and decision.weight is not None and len(decision.weight.users) == 1
    return own and node.args[0] is source and not quantizer_at(gm, call).settled  # type: ignore[arg-type]


def weights(gm: fx.GraphModule, group: Group) -> list[Tensor]:
    """[out, in] each, in float32."""
    tensors = [parameter(gm, decision_of(n).weight) for n in group.linears]  # type: ignore[union-attr]
    return [t.detach().float() for t in tensors if t is not None]


def tied(gm: fx.GraphModule, group: Group) -> Callable[[Tensor], Tensor]:
    """Makes of a positive scale [in] one that can be folded."""
    maker = _maker(gm, group)
    return maker.tied if maker else lambda scale: scale


def _maker(gm: fx.GraphModule, group: Group) -> Maker | None:
    return made_by(gm, group.source, group.readers)


def search_scales(
    graphs: Sequence[fx.GraphModule],
    run: Run,
    every: Sequence[dict[str, Group]],
    choose: Callable[[Group, RowSamples], Tensor | None],
    *,
    label: str,
    most: int,
    padding: bool,
) -> None:
    """Choose a scale for each group that all graphs have (every: by name, of each graph), and put it into all of them.

    choose: from what was seen of the group's tensor in the first graph, `most` rows of it; None for no scale. padding:
    tokens that a mask leaves out are looked at too. What an earlier run has left in the store is not searched again.
    """
    found = {name: g for name, g in every[0].items() if all(name in others for others in every)}
    digests = _digests(graphs[0], found) if run.store is not None else {}
    known = run.store.get_scales(run.step, digests) if run.store is not None else None
    scales = known and {name: scale.to(device_of(graphs[0])) for name, scale in known.items()}
    if scales is None:
        scales = {}
        seen = rows_of(graphs[0], run, {name: g.source for name, g in found.items()}, most, padding=padding)
        for (name, group), (_, rows) in zip(run.progress(found.items(), label), seen, strict=True):
            if not rows.reached:  # an expert that the model has not chosen once
                continue
            expect_data(LayerView(graphs[0], group.linears[0]), rows.count, rows.magnitude if rows.count else None)
            scale = choose(group, rows)
            if scale is not None:
                scales[name] = scale
            give_back()
        if run.store is not None:
            run.store.put_scales(run.step, scales, digests)
    apply_everywhere(graphs, every, scales)
    if run.store is not None:
        run.store.put_others(*_changed(graphs[0]))


def _digests(gm: fx.GraphModule, found: dict[str, Group]) -> dict[str, str]:
    """Of the weights of each group."""
    return {name: " ".join(map(digest_of, weights(gm, group))) for name, group in found.items()}


def _changed(gm: fx.GraphModule) -> tuple[dict[str, Tensor], list[str]]:
    """(what has taken in scales and is not quantized, and scales that stand between two ops; the names of weights that
    have taken in scales)."""
    others, scaled_weights = {}, []
    for node in gm.graph.find_nodes(op="get_attr"):
        name, tensor = str(node.target), held(gm, node)
        if tensor is None or not (WORD in name or name.rpartition(".")[2].startswith(FACTORS)):
            continue
        if any(user.op == "call_module" for user in node.users):
            scaled_weights.append(name)
        else:
            others[name] = values_of(tensor)
    return others, scaled_weights


@dataclass(frozen=True)
class Pair:
    """Linears that read one tensor, and what a scale of its channels can be folded into; by module paths.

    into: a norm, or a linear; "" where the scale would be a multiplication.
    """

    into: str
    linears: tuple[str, ...]


def scaling_pairs(prepared: fx.GraphModule) -> list[Pair]:
    """The pairs of a prepared graph, in its order: what other libraries keep in a table for every model."""
    return [pair_of(prepared, group) for group in groups(prepared)]


def pair_of(gm: fx.GraphModule, group: Group) -> Pair:
    """By the names of modules."""
    maker = _maker(gm, group)
    into = LayerView(gm, maker.op).path if maker else ""
    return Pair(into, tuple(LayerView(gm, n).path for n in group.linears))


def apply_everywhere(
    graphs: Sequence[fx.GraphModule], found: Sequence[dict[str, Group]], scales: dict[str, Tensor]
) -> None:
    """Put scales, by the names of their tensors, into all graphs alike. found: the groups of each graph."""
    folds = {n: all(_maker(gm, g[n]) for gm, g in zip(graphs, found, strict=True)) for n in scales}
    for gm, named in zip(graphs, found, strict=True):
        for name, scale in scales.items():
            apply_scale(gm, named[name], scale, fold=folds[name])
            give_back()  # a weight that two scales reach is made twice
        gm.meta[SMOOTHED] = [*gm.meta.get(SMOOTHED, []), *([name, folds[name]] for name in scales)]
        finish(gm)


def place_scales(gm: fx.GraphModule, smoothed: Sequence[tuple[str, bool]]) -> None:
    """Scales of one for the groups of these tensors, folded or not: their values come from a file."""
    for name, fold in smoothed:
        group = next((g for g in groups(gm) if g.name == name), None)
        if group is not None:
            apply_scale(gm, group, torch.ones_like(weights(gm, group)[0][0]), fold=fold)
    if smoothed:
        gm.meta[SMOOTHED] = [list(s) for s in smoothed]
        finish(gm)


def apply_scale(gm: fx.GraphModule, group: Group, scale: Tensor, *, fold: bool) -> None:
    """Divide the tensor by the scale [in], where it is made or by a multiplication, and multiply the weights by it."""
    scale = tied(gm, group)(scale) if fold else scale  # of a run that did not know of heads that share one of v
    for node in group.linears:
        decision = decision_of(node)
        assert decision is not None and decision.weight is not None
        weight, (_, call) = held(gm, decision.weight), quantizer_calls(decision)
        assert weight is not None and call is not None
        decision.weight = replace_read(gm, decision.weight, call, scaled(weight, scale), WORD)
        decision.reason += "; scaled by channel"
    if fold:
        maker = _maker(gm, group)
        assert maker is not None, group.name
        maker.divide(gm, scale)
        mark_rescaled(gm, maker.op, group.readers)
    else:
        _multiply(gm, group, 1 / scale)


def _multiply(gm: fx.GraphModule, group: Group, factor: Tensor) -> None:
    base = str(decision_of(group.linears[0]).weight.target).rpartition(".")[0]  # type: ignore[union-attr]
    name = f"{base}.{FACTORS}" if base else FACTORS
    with gm.graph.inserting_before(min(group.readers)):
        read = gm.graph.get_attr(set_parameter(gm, name, factor))
        made = (group.source, read)  # named after its source: in the graphs of several targets it is the same tensor
        product = gm.graph.create_node(
            "call_function", torch.ops.aten.mul.Tensor, made, name=f"{group.source.name}_smoothed"
        )
    read.meta = {"val": factor}
    product.meta = {k: v for k, v in group.source.meta.items() if k in ("val", "nn_module_stack")}
    product.meta[DECISION] = Decision("float", "divides by scales of channels", rule="algorithm")
    for reader in group.readers:
        reader.replace_input_with(group.source, product)
    for node in group.linears:
        decision = decision_of(node)
        assert decision is not None
        decision.inputs = {product if k is group.source else k: v for k, v in decision.inputs.items()}
