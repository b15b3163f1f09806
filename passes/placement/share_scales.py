"""One scale per tensor over the block scales (NVFP4) for weights that a server multiplies as one matrix.

q, k and v read one tensor, gate and up do: their weights are stacked, and then there is one global scale. They are
found in the graph, as linears on the same input, never by their names.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graphq.graph.decision import decision_of
from graphq.graph.view import LayerView, parameter
from graphq.numerics.scales import TWO_LEVEL
from graphq.quantizer import TensorQuantizer

from .edges import quantizer_at, quantizer_calls


def shared_magnitudes(gm: fx.GraphModule) -> dict[TensorQuantizer, Tensor]:
    """quantizer → the largest magnitude among all weights of its group, for specs with scales of two levels."""
    groups: dict[fx.Node, dict[TensorQuantizer, Tensor]] = {}
    for node in gm.graph.nodes:
        decision = decision_of(node)
        if decision is None or decision.weight is None or LayerView(gm, node).family != "linear":
            continue
        _, call = quantizer_calls(decision)
        quantizer = quantizer_at(gm, call) if call is not None else None
        if quantizer is None or quantizer.spec.scale not in TWO_LEVEL:
            continue
        weight = parameter(gm, decision.weight)
        if weight is None:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        groups.setdefault(source, {})[quantizer] = weight.detach().abs().max()
    return {q: torch.stack(list(g.values())).max() for g in groups.values() for q in g}
