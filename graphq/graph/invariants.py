"""What must hold between passes."""

from __future__ import annotations

from torch import fx

from graphq.errors import PassError
from graphq.graph.view import parameter


def check_graph(gm: fx.GraphModule) -> None:
    """Raises PassError if the graph is malformed: order, dangling references, missing tensors or modules."""
    try:
        gm.graph.lint()
    except (RuntimeError, AssertionError, AttributeError) as e:
        raise PassError(f"the graph is malformed: {e}", remedy="A pass left it so: run them one by one.") from e
    for node in gm.graph.nodes:
        if node.op == "get_attr" and parameter(gm, node) is None:
            raise PassError("a get_attr node reads no tensor", where=str(node.target))
        if node.op == "call_module" and not node.users:
            raise PassError("a quantizer feeds nothing", where=str(node.target), remedy="Erase its node.")
