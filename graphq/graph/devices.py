"""Where a graph's tensors are, and the same graph on the CPU."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphq.graph.capture import Example, example_of
from graphq.graph.fork import fork

CPU = torch.device("cpu")


def device_of(gm: fx.GraphModule) -> torch.device:
    """That of the first tensor the graph holds, or of its example inputs where it holds none."""
    example = example_of(gm)
    tensors = itertools.chain(gm.parameters(), gm.buffers(), pytree.tree_leaves((example.args, example.kwargs)))
    return next((t.device for t in tensors if isinstance(t, Tensor)), CPU)


def moved(value: Any, device: torch.device) -> Any:
    """Whatever holds tensors, with these on the device."""
    return pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, value)


def on_cpu(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph itself if it is on the CPU, else a copy there: what runtimes for CPUs are held against."""
    if device_of(gm).type == "cpu":
        return gm
    result = fork(gm)
    for node in result.graph.nodes:
        if node.op == "get_attr":
            path, _, leaf = node.target.rpartition(".")
            owner = result.get_submodule(path)  # a fork's own
            tensor = getattr(owner, leaf)
            delattr(owner, leaf)
            owner.register_buffer(leaf, tensor.detach().cpu())
        if node.op == "call_module":
            result.set_submodule(node.target, copy.deepcopy(result.get_submodule(node.target)).cpu())
        node.args, node.kwargs = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: CPU if isinstance(a, torch.device) else a
        )
    example = example_of(gm)
    args, kwargs = moved((example.args, example.kwargs), CPU)
    result.meta["graphq_example"] = Example(args, kwargs, example.dynamic_shapes)
    result.recompile()
    return result
