"""NVIDIA TensorRT, explicit quantization: Q and DQ on what enters weighted layers, everything else left to its builder.

The rules are those of its documentation ("Working with Quantized Types"): symmetric codes with zero point 0, scales per
tensor on activations and per output channel on weights, biases in float; Q and DQ in front of convolutions and
products with a weight and on the residual branch of a sum that a convolution's kernel takes in, none behind them; batch
norms and activations in float, which the builder fuses.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphq.config.scheme import Scheme
from graphq.config.spec import QuantSpec
from graphq.graph.fork import fork
from graphq.graph.match import Match
from graphq.graph.optable import family_of
from graphq.graph.view import LayerView

from ..lowering.explicit_qdq import lower_to_explicit_qdq
from .table import TARGETS, Kernel, PackedKernel, Target

INT4_BLOCKS, NVFP4_BLOCK = (64, 128), 16


def sum_of_convolution(m: Match) -> str | None:
    """Why no convolution's kernel takes a sum in, or None."""
    return None if branches(m) else "no operand comes straight from a convolution that nothing else reads"


def residual_branch(m: Match) -> Sequence[fx.Node]:
    """The operand that is not computed by the kernel which adds it."""
    return branches(m)[1:]


def main_branch(m: Match) -> fx.Node:
    """The convolution that computes the sum."""
    return branches(m)[0]


def branches(m: Match) -> list[fx.Node]:
    """(the convolution, the residual branch) of a sum; of two convolutions the one with more ops before it since the
    branches parted computes the sum. Empty where neither is one."""
    operands = [v.node for v in (m.a, m.b) if isinstance(v, LayerView)]
    convs = [n for n in operands if family_of(n.target) == "conv" and len(n.users) == 1]
    if not convs or len(set(operands)) < 2:
        return []
    main = convs[0] if len(convs) == 1 else _longer(*operands)
    return [main, next(n for n in operands if n is not main)]


def _longer(a: fx.Node, b: fx.Node) -> fx.Node:
    """Of two branches, walked back along first inputs, the one that reaches the common tensor later."""
    chains: list[dict[fx.Node, int]] = [{a: 0}, {b: 0}]
    ends: list[fx.Node | None] = [a, b]
    while any(ends):
        for i, end in enumerate(ends):
            if end is None:
                continue
            if end in chains[1 - i]:
                return (a, b)[i] if chains[i][end] > chains[1 - i][end] else (a, b)[1 - i]
            step = next((n for n in end.all_input_nodes if n.op != "get_attr"), None)
            if step is not None:
                chains[i][step] = chains[i][end] + 1
            ends[i] = step
    return a


def int4_blocks(m: Match, spec: QuantSpec) -> str | None:
    """Weights beside float inputs: symmetric int4 in blocks of 64 or 128, NVFP4, int8 and fp8 per channel."""
    if spec.format == "fp4_e2m1" and spec.scale == "e4m3" and spec.group_size == NVFP4_BLOCK:
        return None
    if not spec.symmetric:
        return "TensorRT takes zero point 0 only"
    if spec.format in ("int8", "fp8_e4m3") and spec.granularity in ("tensor", "channel"):
        return None
    if spec.format != "int4" or spec.granularity != "group" or spec.axis not in (None, 1, -1):
        return f"{spec} is not one of int4 and nvfp4 in blocks along the rows, int8 and fp8_e4m3 per channel"
    if spec.group_size not in INT4_BLOCKS:
        return f"blocks have 64 or 128 values, not {spec.group_size}"
    return None


def one_format(scheme: Scheme) -> str | None:
    """Why TensorRT refuses specs together, or None."""
    specs = [s for s in (scheme.input, scheme.weight) if s is not None]
    if any(not s.symmetric for s in specs):
        return "zero points are 0 only"
    if len({s.format for s in specs}) > 1:
        return f"weights in {specs[1].format} beside inputs in {specs[0].format}"
    blocks = {(s.group_size, s.scale) for s in specs}
    if blocks != {(None, "float")} and (len(blocks) > 1 or len(specs) < 2):
        return f"{' beside '.join(map(str, specs))}: weights and inputs are in blocks, both of the same, or neither is"
    return None


KERNELS = {
    "conv": [Kernel("Convolution", "compute", output="optional", bias="float")],
    "conv_transpose": [Kernel("Deconvolution", "compute", output="optional", bias="float")],
    "linear": [Kernel("MatrixMultiply", "compute", output="optional", bias="float")],
    "add": [
        Kernel("Convolution with sum", "compute", output="optional", bias="float", when=sum_of_convolution,
               inputs=residual_branch, within=main_branch),
    ],
}  # fmt: skip

BLOCKS = {"linear": [Kernel("MatrixMultiply", "compute", output="optional", bias="float")]}
DYNAMIC = {
    QuantSpec(format="nvfp4", dynamic="local"): BLOCKS,
    QuantSpec(format="mxfp8_e4m3", dynamic=True): BLOCKS,
}

FUSED = "TensorRT's builder fuses it with its neighbours; Q and DQ around it would hinder that"
FLOAT_REASONS = {
    **dict.fromkeys(("relu", "clip", "leaky_relu", "sigmoid", "silu", "gelu", "hardswish", "hardsigmoid", "mul",
                     "linear_activation"), FUSED),
    "max_pool": "TensorRT moves the Q of the next layer in front of it",
    "cat": "TensorRT moves the Q of the next layer in front of it where scales are equal",
    "matmul": "products of two activations stay in half precision, where TensorRT fuses attention",
    "attention": "TensorRT fuses attention in half precision",
}  # fmt: skip


@TARGETS.register("tensorrt")
def tensorrt_target() -> Target:
    """int8 and fp8 layers, NVFP4 and MXFP8 ones whose inputs get their scales at run time, int4 and NVFP4 weights in
    blocks; symmetric throughout."""
    return Target(
        name="tensorrt",
        cpu="any",
        kernels=KERNELS,
        float_reasons=FLOAT_REASONS,
        weight_only_notes={},
        activation_formats=frozenset({"int8", "fp8_e4m3"}),
        weight_formats=frozenset({"int8", "fp8_e4m3", "int4", "fp4_e2m1"}),
        weight_granularities=frozenset({"tensor", "channel", "group"}),
        saturates=False,
        lowering=lower_to_explicit_qdq,
        reference=fork,
        weight_only={"linear": [PackedKernel("weight-only MatrixMultiply", int4_blocks)]},
        dynamic=DYNAMIC,
        symmetric_only=True,
        refuses=one_format,
    )
