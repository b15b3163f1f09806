"""Put what calibration and weight algorithms have made of the weights back into the model that was traced.

So that everything that is written for the model still works (`model.generate`, an evaluation harness): its weights are
those of the quantized graph, dequantized. Activations stay float.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from graphq.algorithms.store import original_name
from graphq.errors import StateError
from graphq.graph.view import parameter
from graphq.qat import FOLDED
from graphq.quantizer import TensorQuantizer

MADE_BY_TRACING = "lifted_tensor"  # constants of the model's own forward, by torch.export's name


@torch.no_grad()
def apply_weights(calibrated: fx.GraphModule, model: nn.Module) -> nn.Module:
    """A copy of the model with the weights of a calibrated graph, dequantized, and the norms and biases that go with
    them.

    Raises StateError for graphs of another stage, for other models, and for graphs with tensors that the model has no
    place for: folded batch norms, scales of channels that stand between two ops.
    """
    if calibrated.meta.get("graphq_stage") != "calibrated" or FOLDED in calibrated.meta:
        raise StateError(
            "weights are applied from a calibrated graph", remedy="Call graphq.prepare and graphq.calibrate first."
        )
    result = copy.deepcopy(model)
    state = dict(result.named_parameters(remove_duplicate=False)) | dict(result.named_buffers(remove_duplicate=False))
    given: dict[str, Tensor] = {}
    for node in calibrated.graph.find_nodes(op="get_attr"):
        tensor = parameter(calibrated, node)
        if tensor is None or not tensor.is_floating_point() or MADE_BY_TRACING in str(node.target):
            continue
        for value in _as_read(calibrated, node, tensor):
            name, turned = original_name(str(node.target), state)
            if name is None:
                raise StateError(
                    "the model has no place for this tensor of the graph",
                    where=str(node.target),
                    remedy="Apply weights of graphs without folded batch norms and without scales between ops.",
                )
            value = value.T if turned else value
            if name in given and not torch.equal(given[name], value):
                raise StateError("this weight is shared, and read in two ways", where=name, remedy="Untie it first.")
            given[name] = value
    for name, value in given.items():
        if state[name].shape != value.shape:
            raise StateError("this weight has another shape in the model", where=name, remedy="Give the traced model.")
        state[name].data = value.to(state[name]).clone()
    return result


def _as_read(gm: fx.GraphModule, node: fx.Node, tensor: Tensor) -> list[Tensor]:
    """The tensor as the ops see it that read it: through a quantizer, or as it is."""
    found = []
    for user in node.users:
        quantizer = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
        found.append(quantizer(tensor) if isinstance(quantizer, TensorQuantizer) else tensor.detach())
    return found
