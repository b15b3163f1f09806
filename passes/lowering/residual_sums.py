"""Keep ONNX Runtime from computing a sum inside the norm that follows it.

    layer_norm(a + b)   ⇒   layer_norm(Sum(a, b))

Its optimizer makes Add and LayerNormalization one SkipLayerNormalization, which on CPUs takes two to three times as
long as the two (measured with 1.32: 1.15 against 0.14 + 0.3 ms for 1024 rows of 384). It looks for Add, not for Sum.
"""

from __future__ import annotations

from torch import Tensor, fx

from graphq.graph.onnx_ops import SUM
from graphq.graph.optable import family_of
from graphq.graph.view import value_of

NORMS = ("layer_norm", "rms_norm")


def separate_sums(gm: fx.GraphModule) -> None:
    """Rewrite, in place, every float sum of two tensors that a norm reads."""
    for node in gm.graph.nodes:
        if family_of(node.target) != "add" or len(node.args) != 2 or node.kwargs:
            continue
        floats = all(isinstance(a, fx.Node) and _is_float(a) for a in node.args)
        if floats and any(family_of(user.target) in NORMS for user in node.users):
            node.target = SUM


def _is_float(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype.is_floating_point
