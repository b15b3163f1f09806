"""Target "onnx": the standard, of no runtime in particular. Formats as ONNX can say them, in true types.

int2 and uint2 (opset 25), int4, uint4, int16, blocks (21), fp8 (19), fp4 (23), fp6 (28), E8M0 scales (24). What a
runtime makes of them is its own affair; the file means, bit for bit, what was simulated (`onnx.reference`).
"""

from __future__ import annotations

from torch import fx

from graphq.graph.fork import fork
from graphq.graph.passes import finish

from ..lowering.names import keep_names
from ..lowering.two_level import split_block_scales
from .simulation import FAMILIES
from .table import TARGETS, Kernel, Target

ACTIVATIONS = frozenset(
    ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1",
     "fp6_e3m2", "fp6_e2m3")
)  # fmt: skip
WEIGHTS = ACTIVATIONS | {"int3", "uint3", "int5", "uint5", "int6", "uint6", "int7", "uint7"}


def lower_to_standard(converted: fx.GraphModule) -> fx.GraphModule:
    """A new graph that computes the same."""
    gm = keep_names(converted)
    split_block_scales(gm)
    finish(gm)
    return gm


@TARGETS.register("onnx")
def onnx_target() -> Target:
    """Layers and products in every format that ONNX can say; static scales."""
    return Target(
        name="onnx",
        cpu="any",
        kernels={f: [Kernel("simulated", "compute", output="optional", bias="float")] for f in FAMILIES},
        float_reasons={},
        weight_only_notes={},
        activation_formats=ACTIVATIONS,
        weight_formats=WEIGHTS,
        weight_granularities=frozenset({"tensor", "channel", "group"}),
        saturates=False,
        lowering=lower_to_standard,
        reference=fork,
    )
