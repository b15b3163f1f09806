"""A second graph to work on: same tensors, its own nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx, nn

from graphq.graph.decision import KEY, Decision


def fork(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph can be rewritten freely. Parameters and quantizers are shared, decisions are copied."""
    graph = fx.Graph()
    graph._codegen = gm.graph._codegen
    twin: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, twin)
    original = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(output).meta = dict(original.meta)
    for old, new in twin.items():
        new.meta = dict(old.meta)
        decision = new.meta.get(KEY)
        if isinstance(decision, Decision):
            new.meta[KEY] = _on(decision, twin)
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    copy.train(gm.training)
    return copy


def _on(decision: Decision, twin: dict[fx.Node, fx.Node]) -> Decision:
    """The decision, about the copied nodes; a node that is no longer in the graph stays as it was."""

    def new(node: Any) -> Any:
        return twin.get(node, node)

    return replace(
        decision,
        head=new(decision.head),
        members=[new(n) for n in decision.members],
        inputs={new(n): spec for n, spec in decision.inputs.items()},
        weight=new(decision.weight),
        more_weights=[new(n) for n in decision.more_weights],
        bias=new(decision.bias),
    )


def own_folder(gm: fx.GraphModule, name: str) -> nn.Module:
    """A module of the graph's own at `name`, in place of what it shares with the graph it was forked from."""
    parent, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(parent)
    setattr(owner, leaf, nn.Module())
    return owner.get_submodule(leaf)
