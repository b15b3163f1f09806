"""OpenVINO on a CPU: Q and DQ on what enters layers; its low-precision transformations fuse the rest (measured with
2026.4).

Activations are affine uint8 or symmetric int8, weights symmetric int8. The result of a layer needs no Q: the kernel
takes in bias, batch norm, activation, the sum of a residual block, and the Q of the next layer. On x86 without VNNI its
u8·s8 kernels saturate as ONNX Runtime's do; they fill up odd numbers of input channels.
"""

from __future__ import annotations

from graphq.graph.fork import fork
from graphq.graph.match import Match

from ..lowering.explicit_qdq import lower_to_explicit_qdq
from .onnxruntime import cpu_named
from .table import TARGETS, Kernel, Target
from .tensorrt import branches, main_branch, residual_branch, sum_of_convolution


def sum_in_place(m: Match) -> str | None:
    """Why no convolution's kernel adds its result to the residual branch where that lies, or None."""
    refusal = sum_of_convolution(m)
    if refusal is None:
        main, residual = branches(m)
        return "the residual branch is what the convolution reads" if residual in main.all_input_nodes else None
    return refusal


KERNELS = {
    "conv": [Kernel("Convolution", "compute", output="optional", bias="float")],
    "linear": [Kernel("FullyConnected", "compute", output="optional", bias="float")],
    "matmul": [Kernel("MatMul", "compute", output="optional")],
    "add": [
        Kernel("Convolution", "compute", output="optional", bias="float", when=sum_in_place,
               inputs=residual_branch, within=main_branch),
    ],
}  # fmt: skip

FUSED = "OpenVINO fuses it into the layer before it, or moves the Q of the next layer in front of it"
FLOAT_REASONS = {
    **dict.fromkeys(("relu", "clip", "leaky_relu", "sigmoid", "silu", "gelu", "hardswish", "hardsigmoid", "mul",
                     "linear_activation", "max_pool", "avg_pool", "adaptive_avg_pool", "reshape", "transpose", "cat"),
                    FUSED),
    "conv_transpose": "its int8 layer has not been measured, and is not used",
    "layer_norm": "OpenVINO computes it in float",
    "softmax": "OpenVINO computes it in float",
    "attention": "OpenVINO computes it in float",
    "embedding": "a Gather of floats",
}  # fmt: skip


@TARGETS.register("openvino")
def openvino_target(cpu: str = "auto") -> Target:
    """int8 layers. cpu: "avx2" (x86 without VNNI), "vnni", "arm", or "auto": this one."""
    cpu = cpu_named(cpu, "openvino")
    return Target(
        name="openvino",
        cpu=cpu,
        kernels=KERNELS,
        float_reasons=FLOAT_REASONS,
        weight_only_notes={},
        activation_formats=frozenset({"uint8", "int8"}),
        weight_formats=frozenset({"int8"}),
        saturates=cpu == "avx2",
        lowering=lower_to_explicit_qdq,
        reference=fork,
        options={"cpu": cpu},
        executor="openvino",
        even_channels=True,
    )
