"""torch.compile on x86: Inductor's int8 convolutions and linears (oneDNN), measured with torch 2.13 and torchao 0.18.

Activations are affine uint8 or int8 with one scale, weights symmetric int8 per output channel. The patterns live in
torchao and are registered when its x86 quantizer is imported; without that, and without freezing, a program runs
dequantized in float. `graphq.evaluate.inductor.compile_program` takes care of both.
"""

from __future__ import annotations

from graphq.graph.match import Match

from ..lowering.quantized_decomposed import lower_to_quantized_decomposed
from .onnxruntime import cpu_named
from .table import TARGETS, Kernel, Target


def two_dimensions(m: Match) -> str | None:
    """The patterns are those of 1-d and 2-d convolutions."""
    return None if len(m.weight.shape) in (3, 4) else "only convolutions over one or two dimensions have a kernel"


KERNELS = {
    "conv": [Kernel("qconv_pointwise", "compute", output="optional", bias="float", when=two_dimensions)],
    "linear": [Kernel("qlinear_pointwise", "compute", output="optional", bias="float")],
}

FUSED = "Inductor fuses it into the layer before it, or with its neighbours in a loop"
FLOAT_REASONS = {
    **dict.fromkeys(("relu", "clip", "sigmoid", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "mul", "add",
                     "cat", "linear_activation", "avg_pool", "adaptive_avg_pool", "max_pool"), FUSED),
    "matmul": "products of two activations are computed in float",
    "attention": "computed in float",
    "conv_transpose": "Inductor has no integer kernel for transposed convolutions",
    "embedding": "a gather of floats",
}  # fmt: skip


@TARGETS.register("torch_compile")
def torch_compile_target(cpu: str = "auto") -> Target:
    """A program (.pt2) for torch.compile. cpu: "avx2" (x86 without VNNI), "vnni", "arm", or "auto": this one."""
    cpu = cpu_named(cpu, "torch_compile")
    return Target(
        name="torch_compile",
        cpu=cpu,
        kernels=KERNELS,
        float_reasons=FLOAT_REASONS,
        weight_only_notes={},
        activation_formats=frozenset({"uint8", "int8"}),
        weight_formats=frozenset({"int8"}),
        saturates=cpu == "avx2",
        lowering=lower_to_quantized_decomposed,
        reference=lower_to_quantized_decomposed,
        options={"cpu": cpu},
        executor="inductor",
        even_channels=True,
        suffix=".pt2",
    )
