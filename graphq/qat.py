"""Quantization-aware training: a calibrated graph that trains with the user's own loop and optimizer.

    trained = graphq.qat(graphq.calibrate(graphq.prepare(model, config, (x,)), data), scales="lsq")
    optimizer = torch.optim.Adam(trained.parameters())
    …                                       # the loop of the float model
    graphq.export(graphq.convert(trained), "model.onnx")

Batch norms are folded and dropout is gone: what trains is what runs. All tensors are the graph's own.
"""

from __future__ import annotations

import copy
import itertools
from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn

from graphq.errors import ConfigError, StateError, did_you_mean
from graphq.graph.decision import decision_of
from graphq.graph.fork import fork
from graphq.graph.on_disk import on_disk
from graphq.graph.passes import finish
from graphq.graph.recurrent_ops import LSTM
from graphq.graph.view import MADE, LayerView, drop_unused_parameters, parameter, read_all
from graphq.observers import make_observer
from graphq.quantizer import Learn, quantizers

Scales = Literal["frozen", "lsq", "lsq+", "tqt"]
LEARN: dict[str, Learn] = {"frozen": "", "lsq": "scale", "lsq+": "offset", "tqt": "threshold"}
TRAINED = "graphq_trained"  # in a graph's meta: how its scales are trained


def qat(calibrated: fx.GraphModule, scales: Scales = "lsq", *, clip: bool = True) -> fx.GraphModule:
    """A copy of a calibrated graph in which weights, biases and (as `scales` says) quantizers train.

    scales: "frozen" as calibrated; "lsq" learned; "lsq+" learned with their zero points; "tqt" powers of two, learned.
    clip: gradients stop where a code was clamped; False lets all of them through.
    Raises StateError for a graph that is not calibrated, or has quantized LSTMs.
    """
    if scales not in LEARN:
        raise ConfigError(f"unknown way to train scales: {scales!r}", remedy=did_you_mean(scales, get_args(Scales)))
    if calibrated.meta.get("graphq_stage") != "calibrated" or FOLDED in calibrated.meta:
        raise StateError(
            "quantization-aware training starts from a calibrated graph",
            remedy="graphq.qat(graphq.calibrate(graphq.prepare(…), data)); fold_weights cannot be undone.",
        )
    for node in calibrated.graph.find_nodes(op="call_function", target=LSTM):
        raise StateError(
            "an LSTM that is quantized at run time has no gradient",
            where=LayerView(calibrated, node).where(),
            remedy="Leave it float with a rule, and train the rest.",
        )
    gm = own_tensors(fork(calibrated))
    finish(gm)  # tensors that passes have replaced would never get a gradient
    make_trainable(gm)
    for quantizer in quantizers(gm).values():
        quantizer.trainable(LEARN[scales], clip=clip)
    gm.meta[TRAINED] = scales
    return gm.train()


def own_tensors(gm: fx.GraphModule) -> fx.GraphModule:
    """Give a forked graph copies of all tensors and quantizers. Raises StateError where they are on disk."""
    if any(on_disk(t) for t in itertools.chain(gm.parameters(), gm.buffers())):
        raise StateError(
            "its weights are on disk", remedy="Convert the graph, which reads them, or load the model whole."
        )
    memo: dict[int, object] = {}
    for name, child in list(gm.named_children()):
        setattr(gm, name, copy.deepcopy(child, memo))
    for name, tensor in list(gm._parameters.items()):
        gm._parameters[name] = copy.deepcopy(tensor, memo)
    for name, buffer in list(gm._buffers.items()):
        gm._buffers[name] = copy.deepcopy(buffer, memo)
    return gm


def make_trainable(gm: fx.GraphModule) -> None:
    """Weights and biases that passes have folded or moved are buffers: they are parameters again."""
    made = gm.meta.get(MADE, ())
    for node in gm.graph.nodes:
        decision = decision_of(node)
        reads = [decision.weight, decision.bias] if decision is not None else []
        for read in [*reads, *([node] if node.op == "get_attr" and node.target in made else [])]:
            tensor = parameter(gm, read)
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not isinstance(tensor, nn.Parameter):
                owner_path, _, leaf = str(read.target).rpartition(".")
                owner = gm.get_submodule(owner_path)
                delattr(owner, leaf)
                owner.register_parameter(leaf, nn.Parameter(tensor))
    for tensor in gm.parameters():
        tensor.requires_grad_(tensor.is_floating_point())


def observers(trained: fx.GraphModule, on: bool) -> None:
    """Let the ranges of activations follow a moving average of the data (on), or keep them from here on (off).

    For a schedule: on for the first epochs, off for the last. Only with frozen scales: learned ones need no observer.
    """
    if trained.meta.get(TRAINED) != "frozen":
        raise StateError("only frozen scales are set by observers", remedy="graphq.qat(calibrated, scales='frozen').")
    for q in quantizers(trained).values():
        if not q.constant and not q.spec.dynamic:
            follow = q.spec.model_copy(update={"observer": "moving_average", "observer_args": {}})
            q.observer = make_observer(follow, q.block) if on else None


def settle(trained: fx.GraphModule) -> fx.GraphModule:
    """A calibrated graph with what was trained: fixed scales, no gradients."""
    gm = own_tensors(fork(trained))
    del gm.meta[TRAINED]
    for quantizer in quantizers(gm).values():
        quantizer.settle()
    for tensor in gm.parameters():
        tensor.requires_grad_(False)
    return gm.eval()


FOLDED = "graphq_folded"  # in a graph's meta: its weights are fake-quantized for good


@torch.no_grad()
def fold_weights(calibrated: fx.GraphModule) -> fx.GraphModule:
    """A copy for fast evaluation: weights are fake-quantized once, not at every call. It cannot be trained, converted
    or exported: the float weights are gone. Those on disk are read."""
    if calibrated.meta.get("graphq_stage") != "calibrated":
        raise StateError("folding takes a calibrated graph", remedy="Call graphq.prepare and graphq.calibrate first.")
    trained = TRAINED in calibrated.meta
    gm = settle(calibrated) if trained else fork(calibrated)
    for node in list(gm.graph.nodes):
        if node.op != "call_module":
            continue
        source = node.args[0]
        tensor = parameter(gm, source) if isinstance(source, fx.Node) else None
        if isinstance(tensor, Tensor):
            name = f"{node.name}_folded"
            gm.register_buffer(name, gm.get_submodule(str(node.target))(tensor))
            with gm.graph.inserting_before(node):
                new = gm.graph.get_attr(name)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            if not source.users:  # type: ignore[union-attr]
                gm.graph.erase_node(source)  # type: ignore[arg-type]
    gm.delete_all_unused_submodules()
    drop_unused_parameters(gm)
    read_all(gm)
    gm.meta[FOLDED] = True
    gm.recompile()
    return gm if trained else own_tensors(gm)
