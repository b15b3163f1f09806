"""Put what calibration and weight algorithms have made of the weights back into the model that was traced.

So that everything that is written for the model still works (`model.generate`, an evaluation harness): its weights are
those of the quantized graph, dequantized, or packed until a layer uses them. Activations stay float.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, fx, nn

from graphq.algorithms.codes import codes_of
from graphq.algorithms.packed import Packed
from graphq.algorithms.store import original_name
from graphq.errors import StateError
from graphq.graph.on_disk import on_disk
from graphq.graph.view import parameter
from graphq.qat import FOLDED
from graphq.quantizer import TensorQuantizer

MADE_BY_TRACING = "lifted_tensor"  # constants of the model's own forward, by torch.export's name


@torch.no_grad()
def apply_weights(calibrated: fx.GraphModule, model: nn.Module, *, packed: bool = False) -> nn.Module:
    """A copy of the model with the weights of a calibrated graph, dequantized, and the norms and biases that go with
    them.

    packed: quantized weights stay codes, and are dequantized whenever their layer runs: less memory, more time, the
    same values. They are parametrizations of their layers. Raises StateError for models on disk, for graphs of another
    stage, for other models, and for graphs with tensors that the model has no place for: folded batch norms, scales of
    channels that stand between two ops.
    """
    meta = getattr(calibrated, "meta", {})  # whoever gives the model first is told so
    if meta.get("graphq_stage") != "calibrated" or FOLDED in meta:
        raise StateError(
            "weights are applied from a calibrated graph", remedy="Call graphq.prepare and graphq.calibrate first."
        )
    if any(on_disk(p) for p in model.parameters()):
        raise StateError(
            "the weights of this model are on disk, and a copy would not be",
            remedy="Give it in memory; or calibrate with a store: graphq.apply_stored(store, model, packed=True).",
        )
    result = copy.deepcopy(model)
    state = dict(result.named_parameters(remove_duplicate=False)) | dict(result.named_buffers(remove_duplicate=False))
    given: dict[str, Tensor] = {}
    codes: dict[str, Packed] = {}
    for node in calibrated.graph.find_nodes(op="get_attr"):
        tensor = parameter(calibrated, node)
        if tensor is None or not tensor.is_floating_point() or MADE_BY_TRACING in str(node.target):
            continue
        for value, quantizer in _as_read(calibrated, node, tensor):
            name, turned = original_name(str(node.target), state)
            if name is None:
                raise StateError(
                    "the model has no place for this tensor of the graph",
                    where=str(node.target),
                    remedy="Give the model that was traced, in float. Folded batch norms have no place there, nor "
                    "scales between two ops: ignore the layers that read these, or name others in scaling_layers.",
                )
            value = value.T if turned else value
            if name in given and not torch.equal(given[name], value):
                raise StateError("this weight is shared, and read in two ways", where=name,
                                 remedy=f"Quantize both or none: ignore the layer of {node.target}, say.")  # fmt: skip
            given[name] = value
            if packed and quantizer is not None and isinstance(state[name], nn.Parameter):
                codes[name] = _packed(tensor, quantizer, turned)
            elif packed and quantizer is not None:
                warnings.warn(f"{name} is no parameter but a buffer, and goes back dequantized", stacklevel=3)
    for name, value in given.items():
        if state[name].shape != value.shape:
            raise StateError("this weight has another shape in the model", where=name, remedy="Give the traced model.")
        state[name].data = value.to(state[name]).clone()
    for name, weight in codes.items():
        weight.put_into(result, state[name])  # type: ignore[arg-type]
    return result


def _as_read(gm: fx.GraphModule, node: fx.Node, tensor: Tensor) -> list[tuple[Tensor, TensorQuantizer | None]]:
    """The tensor as the ops see it that read it: through a quantizer, or as it is."""
    found: list[tuple[Tensor, TensorQuantizer | None]] = []
    for user in node.users:
        quantizer = gm.get_submodule(str(user.target)) if user.op == "call_module" else None
        through = isinstance(quantizer, TensorQuantizer)
        found.append((quantizer(tensor), quantizer) if through else (tensor.detach(), None))  # type: ignore[arg-type, misc]
    return found


def _packed(weight: Tensor, quantizer: TensorQuantizer, turned: bool) -> Packed:
    codes, (scale, zero), fmt = codes_of(weight, quantizer), quantizer.qparams, quantizer.spec.number_format
    return Packed(codes, scale, zero, quantizer.block, fmt, weight.shape, turned=turned)
