"""The rules of TensorRT alone, from its documentation on explicit quantization."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphq.lint.graph import Graph
from graphq.lint.rules import Finding, rule


@rule("tensorrt")
def symmetric(g: Graph) -> Iterator[Finding]:
    """A zero point that is not zero, or unsigned codes: TensorRT refuses the model."""
    for node in g.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = g.quantization(node).zero
        codes = g.array(node.input[0]) if node.op_type == "DequantizeLinear" else None
        kind = zero.dtype if zero is not None else codes.dtype if codes is not None else None
        if kind == np.int32:
            continue  # a bias: `quantized_bias`
        if (zero is not None and np.any(zero.astype(np.float32) != 0)) or kind == np.uint8:
            yield Finding(
                "symmetric", g.label(node),
                "TensorRT takes signed codes with zero point 0 only",
                "Quantize symmetrically to int8 (target 'tensorrt').",
            )  # fmt: skip


@rule("tensorrt")
def quantized_bias(g: Graph) -> Iterator[Finding]:
    """A bias that is dequantized from int32: TensorRT wants it float."""
    for node in g.nodes:
        bias = g.dequantized(node.input[2]) if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 else None
        codes = None if bias is None or bias.scale is None else g.array(bias.codes)
        if codes is not None and codes.dtype == np.int32:
            yield Finding(
                "quantized_bias", g.label(node),
                "its bias is quantized: TensorRT has no int32 DequantizeLinear",
                "Leave the bias float, as `--fix` does.", fixable=True,
            )  # fmt: skip
