"""Target "simulation": no runtime. Every format and granularity is simulated on the weights, inputs and outputs of
layers and products, and on what enters attention.

For studies of accuracy, and for quantization-aware training before a runtime is chosen.
"""

from __future__ import annotations

from torch import fx

from graphq.errors import TargetError
from graphq.graph.fork import fork

from .table import TARGETS, Kernel, Target

FAMILIES = ("conv", "conv_transpose", "linear", "linear_activation", "experts", "matmul", "attention")


def _no_runtime(gm: fx.GraphModule) -> fx.GraphModule:
    raise TargetError(
        "the target 'simulation' has no runtime to export to",
        remedy="Prepare the model for target='onnxruntime' or 'onnx'.",
    )


@TARGETS.register("simulation")
def simulation_target() -> Target:
    """Quantizers wherever the config asks for them on layers, products and attention, of any format."""
    return Target(
        name="simulation",
        cpu="any",
        kernels={f: [Kernel("simulated", "compute", output="optional", bias="float")] for f in FAMILIES},
        float_reasons={},
        weight_only_notes={},
        activation_formats=None,
        weight_formats=None,
        saturates=False,
        lowering=_no_runtime,
        reference=fork,
    )
