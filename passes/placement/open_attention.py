"""Take an attention apart where the config wants it quantized and the target computes its parts on integers.

    attention(q, k, v)   ⇒   softmax(q · scale · kᵀ) · v

The products and the softmax get decisions of their own then, by the rule that selects the attention.
"""

from __future__ import annotations

from torch import fx

from graphq.config import QuantConfig
from graphq.graph.passes import finish
from graphq.graph.view import LayerView, layers

from ..lowering.attention import is_plain_attention, take_apart
from ..targets.table import Target


def open_attention(gm: fx.GraphModule, config: QuantConfig, target: Target) -> int:
    """Rewrite, in place, every attention whose inputs are to have scales that calibration finds. Returns how many."""
    if not target.opens_attention:
        return 0
    asked = [v for v in layers(gm) if is_plain_attention(v) and _asked(v, config)]
    if asked:
        take_apart(gm, asked)
        finish(gm)
    return len(asked)


def _asked(view: LayerView, config: QuantConfig) -> bool:
    scheme = config.resolve(view).scheme
    return scheme is not None and scheme.input is not None and not scheme.input.dynamic
