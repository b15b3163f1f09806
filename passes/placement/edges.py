"""The quantizers on the edges of one op, found from its decision."""

from __future__ import annotations

from torch import fx

from graphq.graph.decision import Decision
from graphq.graph.view import LayerView
from graphq.quantizer import TensorQuantizer


def quantizer_calls(decision: Decision) -> tuple[list[fx.Node], fx.Node | None]:
    """(calls that quantize the activations, call that quantizes the weight) of an op and what is fused with it."""
    calls = {a: None for m in reversed(decision.members) for a in m.all_input_nodes if a.op == "call_module"}
    weight = next((c for c in calls if c.args[0] is decision.weight), None)
    return [c for c in calls if c is not weight], weight


def quantizer_at(gm: fx.GraphModule, call: fx.Node) -> TensorQuantizer:
    """The quantizer that a call_module node calls."""
    quantizer = gm.get_submodule(str(call.target))
    assert isinstance(quantizer, TensorQuantizer)
    return quantizer


def channels_read(gm: fx.GraphModule, node: fx.Node, decision: Decision) -> tuple[fx.Node, int]:
    """(the float tensor that a convolution or linear reads, the axis of its channels)."""
    source = quantizer_calls(decision)[0][0].args[0]
    assert isinstance(source, fx.Node)
    return source, 1 if LayerView(gm, node).family == "conv" else -1
