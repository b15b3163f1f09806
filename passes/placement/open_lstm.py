"""Take an LSTM apart where the config wants it quantized at run time and the target has a kernel for that.

    lstm(x, (h, c), weights of all layers and directions)   ⇒   for each layer and direction: graphq::lstm

Each of these has two weights, that of its input and that of its state, and gets a decision of its own, by the rule
that selects the LSTM.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from graphq.config import QuantConfig
from graphq.graph.decision import decision_of
from graphq.graph.infer import infer
from graphq.graph.passes import finish
from graphq.graph.recurrent_ops import LSTM
from graphq.graph.view import LayerView, layers, parameter, set_parameter

from ..targets.table import Target

aten = torch.ops.aten
WHOLE = aten.lstm.input


def open_lstm(gm: fx.GraphModule, config: QuantConfig, target: Target) -> int:
    """Rewrite, in place, every LSTM that is to be quantized. Returns how many."""
    asked = [v for v in layers(gm) if v.node.target is WHOLE and is_plain_lstm(v) and _asked(v, config, target)]
    for view in asked:
        _take_apart(view)
    if asked:
        finish(gm)
    return len(asked)


def round_states(gm: fx.GraphModule) -> None:
    """Let the simulation round, at every step, the states that the kernel will round there."""
    for node in gm.graph.find_nodes(op="call_function", target=LSTM):
        decision = decision_of(node)
        if decision is not None and decision.action == "quantize":
            node.update_kwarg("rounds", True)
    gm.recompile()


def is_plain_lstm(view: LayerView) -> bool:
    """Are its weights known, its states as wide as its cells, and its layers not thinned out in between?"""
    weights = view.arg("params")
    known = all(parameter(view.gm, w) is not None for w in weights)
    each, directions = 4 if view.arg("has_biases") else 2, 1 + view.arg("bidirectional")
    whole = len(weights) == each * view.arg("num_layers") * directions
    return known and whole and not (view.arg("train") and view.arg("dropout"))


def _asked(view: LayerView, config: QuantConfig, target: Target) -> bool:
    scheme = config.resolve(view).scheme
    if scheme is None or scheme.weight is None:
        return False
    return "lstm" in (target.dynamic_rows(scheme.input) or {})


def _take_apart(view: LayerView) -> None:
    gm, node = view.gm, view.node
    x, (h, c), weights = (view.arg(k) for k in ("input", "hx", "params"))
    directions = 2 if view.arg("bidirectional") else 1
    each = len(weights) // (view.arg("num_layers") * directions)
    build = _Builder(gm, node)
    if view.arg("batch_first"):
        x = build(aten.transpose.int, x, 0, 1)
    last: list[list[fx.Node]] = [[], []]
    for layer in range(view.arg("num_layers")):
        states = []
        for direction in range(directions):
            index = layer * directions + direction
            weight, recurrent, *biases = weights[index * each : (index + 1) * each]
            first = [build(aten.select.int, s, 0, index) for s in (h, c)]
            bias = build.sum_of(biases)
            whole = build(LSTM, x, weight, recurrent, bias, *first, direction == 1)
            parts = [build(operator.getitem, whole, i) for i in range(3)]
            states.append(parts[0])
            for kept, part in zip(last, parts[1:], strict=True):
                kept.append(part)
        x = states[0] if len(states) == 1 else build(aten.cat.default, states, -1)
    if view.arg("batch_first"):
        x = build(aten.transpose.int, x, 0, 1)
    results = (x, *(build(aten.stack.default, kept) for kept in last))
    for user in list(node.users):  # a getitem each
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


class _Builder:
    """Makes nodes in front of another, with its place in the model."""

    def __init__(self, gm: fx.GraphModule, before: fx.Node) -> None:
        self.gm, self.before = gm, before
        self.place = {k: v for k, v in before.meta.items() if k != "val"}

    def __call__(self, target: object, *args: object) -> fx.Node:
        with self.gm.graph.inserting_before(self.before):
            node = self.gm.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta = {**self.place, "val": infer(node)}
        return node

    def sum_of(self, biases: Sequence[fx.Node]) -> fx.Node | None:
        """torch keeps two biases that are always added."""
        if not biases:
            return None
        tensors = [parameter(self.gm, b) for b in biases]
        assert isinstance(tensors[0], Tensor) and isinstance(tensors[1], Tensor)
        total = tensors[0].detach() + tensors[1].detach()
        with self.gm.graph.inserting_before(self.before):
            node = self.gm.graph.get_attr(set_parameter(self.gm, f"{biases[0].target}_sum", total))
        node.meta = {"val": total}
        return node
