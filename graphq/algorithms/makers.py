"""What makes a tensor: the parameters that scale its channels when they are scaled.

    norm · w ─ x        (1 + w) · norm ─ x        linear(W_up) ─┐
                                                     act(gate) ─ mul ─ x        linear(W) ─ relu ─ x

Attention hands channels of v on, each to the heads of q that share it. Found in the graph, by ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from graphq.algorithms.base import replace_read
from graphq.graph.decision import decision_of
from graphq.graph.on_disk import scaled, values_of
from graphq.graph.optable import family_of
from graphq.graph.view import LayerView, held, value_of
from graphq.passes.placement import quantizer_at, quantizer_calls

WORD = "smoothed"  # appended to the name of a parameter that has taken in a scale
NORMS = ("layer_norm", "rms_norm")
HOMOGENEOUS = ("relu", "leaky_relu")  # a positive scale may as well stand in front of them


@dataclass(frozen=True)
class Part:
    """A parameter of an axis with an entry per channel, and the op that reads it. plus: what is added to it first, as
    in the norms of Gemma, which multiply by 1 + w."""

    read: fx.Node
    user: fx.Node
    axis: int = 0
    plus: float = 0.0


@dataclass(frozen=True)
class Maker:
    """What makes a tensor. sharing: heads of the tensor, one beside the other, that are made of one; width: channels of
    a head."""

    parts: tuple[Part, ...]
    sharing: int = 1
    width: int = 1

    @property
    def op(self) -> fx.Node:
        """The op that computes with the first parameter, behind its quantizer."""
        user = self.parts[0].user
        return next(iter(user.users)) if user.op == "call_module" else user

    def tied(self, scale: Tensor) -> Tensor:
        """A positive scale [channels] as it can be folded: of channels that are made of one, the geometric mean."""
        if self.sharing == 1:
            return scale
        heads = scale.reshape(-1, self.sharing, self.width)
        return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)

    def divide(self, gm: fx.GraphModule, scale: Tensor) -> None:
        """Let the tensor come out divided by a scale [channels] that is tied."""
        own = scale.reshape(-1, self.sharing, self.width)[:, 0].reshape(-1)
        for part in self.parts:
            _divide(gm, part, own)


def made_by(gm: fx.GraphModule, node: fx.Node, readers: Sequence[fx.Node]) -> Maker | None:
    """None if no parameters scale the tensor's channels, or others than the readers would see it."""
    if any(user not in readers for user in node.users):
        return None
    family = family_of(node.target)
    if family in NORMS:
        return _norm(gm, node)
    if family == "mul" and node.args[0] is not node.args[1]:
        sides = [a for a in node.args[:2] if isinstance(a, fx.Node) and value_of(a).shape == value_of(node).shape]
        return next((m for m in (made_by(gm, side, [node]) for side in reversed(sides)) if m), None)
    if family in HOMOGENEOUS:
        return made_by(gm, node.all_input_nodes[0], [node])
    if family == "reshape":
        return _reshaped(gm, node)
    return _weighted(gm, node, 0 if family == "linear" else 1) if family in ("linear", "embedding") else None


def _norm(gm: fx.GraphModule, node: fx.Node) -> Maker | None:
    view, parts = LayerView(gm, node), []
    if view.arg("weight") is None:
        return None
    for read in (view.arg("weight"), view.arg("bias")):
        if read is None:
            continue
        weight, plus = _shifted(read)
        tensor = held(gm, weight)
        if tensor is None or tensor.shape != value_of(node).shape[-1:]:
            return None
        parts.append(Part(weight, node if weight is read else read, plus=plus))
    return Maker(tuple(parts))


def _shifted(read: fx.Node) -> tuple[fx.Node, float]:
    """A parameter that a number is added to: (the parameter, the number)."""
    if family_of(read.target) == "add" and len(read.users) == 1 and not read.kwargs:
        first, second = read.args
        if isinstance(first, fx.Node) and isinstance(second, (int, float)):
            return first, float(second)
    return read, 0.0


def _reshaped(gm: fx.GraphModule, node: fx.Node) -> Maker | None:
    heads = _heads_side_by_side(gm, node)
    if heads is not None:
        linear, reader, sharing, width = heads
        found = made_by(gm, linear, [reader])
        return replace(found, sharing=sharing, width=width) if found else None
    before = node.all_input_nodes[0]  # channels that stay last are the same channels
    same = str(value_of(before).shape[-1]) == str(value_of(node).shape[-1])
    return made_by(gm, before, [node]) if same else None


def _heads_side_by_side(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node, int, int] | None:
    """What o reads is attention over v, [n, length, heads · width], and a channel of it is a channel of v: (the linear
    of v, its reader, heads that share one of v, width)."""
    attention = _only_input(_only_input(node, "reshape"), "transpose")
    if attention is None or family_of(attention.target) != "attention":
        return None
    value = LayerView(gm, attention).arg("value")
    if len(value.users) > 1:
        return None
    values = _before_repeat(value) or value
    split = _only_input(values, "transpose")
    linear = _only_input(split, "reshape")
    if linear is None or split is None or family_of(linear.target) != "linear":
        return None
    n, own, length, width = value_of(values).shape
    heads = value_of(attention).shape[1]
    if not isinstance(own, int) or not isinstance(heads, int) or heads % own:
        return None
    shapes = [_shape(t) for t in (values, split, linear, attention, node)]
    wanted = [[n, own, length, width], [n, length, own, width], [n, length, own * width], [n, heads, length, width],
              [n, length, heads * width]]  # fmt: skip
    return (linear, split, heads // own, width) if shapes == [list(map(str, s)) for s in wanted] else None


def _before_repeat(value: fx.Node) -> fx.Node | None:
    """[n, heads, length, width] of which every head is repeated, one beside the other: what it is made of."""
    wide = _only_input(value, "reshape")
    one = _only_input(wide, "expand")
    own = _only_input(one, "reshape")
    if own is None or wide is None or one is None or len(_shape(own)) != 4 or len(_shape(wide)) != 5:
        return None
    n, heads, length, width = _shape(own)
    repeated = str(int(heads) * int(_shape(wide)[2])) if heads.isdigit() and _shape(wide)[2].isdigit() else ""
    shapes = [_shape(t) for t in (one, wide, value)]
    wanted = [[n, heads, "1", length, width], [n, heads, _shape(wide)[2], length, width], [n, repeated, length, width]]
    return own if shapes == wanted else None


def _shape(node: fx.Node) -> list[str]:
    return [str(s) for s in value_of(node).shape]


def _only_input(node: fx.Node | None, family: str) -> fx.Node | None:
    """What an op of that family reads, if nothing else reads it."""
    if node is None or family_of(node.target) != family:
        return None
    source = node.all_input_nodes[0]
    return source if len(source.users) == 1 else None


def _weighted(gm: fx.GraphModule, node: fx.Node, axis: int) -> Maker | None:
    """Rows of a linear's weight and its bias, or columns of a table, if nothing else reads them."""
    decision, view = decision_of(node), LayerView(gm, node)
    if decision is not None and decision.weight is not None and decision.weight_spec is not None:
        _, call = quantizer_calls(decision)
        weight = decision.weight
        if call is None or len(call.users) > 1 or quantizer_at(gm, call).settled:
            return None
    else:
        weight, call = view.arg("weight"), node
    parts = [Part(weight, call, axis)]
    bias = view.arg("bias") if axis == 0 else None
    if bias is not None:
        parts.append(Part(bias, node))
    alone = all(held(gm, p.read) is not None and len(p.read.users) == 1 for p in parts)
    return Maker(tuple(parts)) if alone else None


def _divide(gm: fx.GraphModule, part: Part, scale: Tensor) -> None:
    tensor = held(gm, part.read)
    assert tensor is not None
    if part.plus:
        tensor = values_of(tensor).detach()
        divided = ((tensor.float() + part.plus) / scale - part.plus).to(tensor.dtype)
    else:
        divided = scaled(tensor, scale[:, None] if tensor.ndim == 2 and part.axis == 0 else scale, divide=True)
    new = replace_read(gm, part.read, part.user, divided, WORD)
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if decision is not None and decision.weight is part.read:
            decision.weight = new
        if decision is not None and decision.bias is part.read:
            decision.bias = new
