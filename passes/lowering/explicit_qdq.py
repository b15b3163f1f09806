"""Lower a converted graph to Q and DQ as TensorRT and OpenVINO read them.

    linear(x, dequantize(codes [out, in]))     ⇒   matmul(x, dequantize(codesᵀ)) + bias,  or addmm for a matrix x
    adaptive_avg_pool(x, 1)                    ⇒   global_average_pool(x)

Quantize and dequantize stay, and are written as the standard's QuantizeLinear and DequantizeLinear; for blocks with
scales found at run time see `dynamic_blocks`. A DequantizeLinear stands directly in front of the product: behind a
Transpose neither would see a weight.
"""

from __future__ import annotations

from torch import fx

from graphq.graph.ops import DEQUANTIZE
from graphq.graph.optable import family_of
from graphq.graph.passes import finish

from .dynamic_blocks import write_dynamic_blocks, write_mxfp8_weights
from .names import keep_names
from .onnx_qdq import global_average_pool, linear_to_matmul
from .two_level import split_block_scales


def lower_to_explicit_qdq(converted: fx.GraphModule) -> fx.GraphModule:
    """A new graph that computes the same."""
    gm = keep_names(converted)
    write_dynamic_blocks(gm)
    for node in list(gm.graph.nodes):
        if family_of(node.target) == "linear" and node.args[1].target is DEQUANTIZE:
            linear_to_matmul(gm, node)
        elif family_of(node.target) == "adaptive_avg_pool":
            global_average_pool(node)
    split_block_scales(gm)
    write_mxfp8_weights(gm)
    gm.graph.eliminate_dead_code()
    finish(gm)
    return gm
