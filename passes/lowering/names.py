"""Names that ops keep in the file, so that it can be compared with the graph op by op."""

from __future__ import annotations

from torch import fx

from graphq.graph.fork import fork

NAME = "graphq"  # key in meta["custom"]; torch.export carries it through


def keep_names(converted: fx.GraphModule) -> fx.GraphModule:
    """A new graph, every op of which says what it was called in the converted one."""
    gm = fork(converted)
    for node in gm.graph.nodes:
        node.meta["custom"] = {NAME: node.name}
    gm.recompile()
    return gm


def product_name(linear: str) -> str:
    """The name of a linear's matrix product, before its bias is added."""
    return f"{linear}_matmul"
