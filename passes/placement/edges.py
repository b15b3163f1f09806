"""The quantizers on the edges of one op, found from its decision."""

from __future__ import annotations

from torch import fx

from graphq.graph.decision import Decision
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
