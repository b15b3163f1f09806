"""One form for products of rows with the weights of their experts, which frameworks write with ops of their own.

grouped_mm(x, transpose(weight), offsets)   ⇒   experts(x, weight, offsets)
"""

from __future__ import annotations

from torch import fx
from torch._ops import OpOverload

from graphq.graph.expert_ops import EXPERTS
from graphq.graph.infer import infer
from graphq.graph.optable import family_of
from graphq.graph.passes import finish
from graphq.graph.view import LayerView, held, schema_of, value_of

GROUPED = "transformers::grouped_mm_fallback"  # what transformers traces in float32; torch's own is for bfloat16


def normalize_experts(gm: fx.GraphModule) -> int:
    """Rewrite, in place, every such product with a weight that is a parameter. Returns how many."""
    found = 0
    for node in list(gm.graph.nodes):
        if not isinstance(node.target, OpOverload) or node.target._schema.name != GROUPED:
            continue
        view = LayerView(gm, node)
        x, turned, offsets = (view.arg(name) for name in schema_of(node.target)[0][:3])
        weight = _transposed(turned)
        if weight is None or held(gm, weight) is None or value_of(x).ndim != 2 or offsets is None:
            continue
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(EXPERTS, (x, weight, offsets))
        new.meta = dict(node.meta)
        new.meta["val"] = infer(new)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        found += 1
    if found:
        finish(gm)
    return found


def _transposed(node: object) -> fx.Node | None:
    """The weight [experts, out, in] behind a transpose of its last two axes."""
    if not isinstance(node, fx.Node) or family_of(node.target) != "transpose" or value_of(node).ndim != 3:
        return None
    axes = tuple(a % 3 for a in node.args[1:3])  # type: ignore[operator]
    source = node.args[0]
    return source if sorted(axes) == [1, 2] and isinstance(source, fx.Node) else None
