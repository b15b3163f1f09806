"""ONNX Runtime on a CPU: what its optimizer really fuses (measured with 1.32)."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from functools import cache, partial, update_wrapper
from typing import Any, Literal

import numpy as np
from torch import fx

from graphq.config.spec import QuantSpec
from graphq.errors import TargetError, did_you_mean
from graphq.graph.match import Match
from graphq.graph.optable import family_of

from ..lowering.integer_reference import lower_to_integer_reference
from ..lowering.onnx_qdq import lower_to_onnx_qdq
from ..lowering.qoperator import lower_to_onnx_qoperator
from ..lowering.weight_only import BLOCKS, block_size, packed_bits
from .table import TARGETS, Kernel, PackedKernel, Target


def _rank(m: Match) -> int:
    return len(m.x.shape)


def _static(m: Match) -> bool:
    return all(isinstance(d, int) for d in m.x.shape)


def rank_2(m: Match) -> str | None:
    return None if _rank(m) == 2 else "the input is not a matrix"


def no_bias(m: Match) -> str | None:
    return None if m.bias is None else "it has a bias"


def matrix_with_bias(m: Match) -> str | None:
    return rank_2(m) or (None if m.bias is not None else "a product without bias takes no activation in")


def dynamic(m: Match) -> str | None:
    """MatMul + Add of a constant becomes a Gemm where all sizes are known, and then wants the bias as integers."""
    return None if not _static(m) else "all sizes are known: MatMul + Add becomes Gemm"


def global_pool(m: Match) -> str | None:
    size = m.root.arg("output_size")
    return None if set(size) == {1} else f"adaptive pooling to {list(size)} is not global pooling"


def nearest(m: Match) -> str | None:
    return None if "nearest" in m.root.op else "only nearest-neighbour resizing runs on integers"


def last_axis_softmax(m: Match) -> str | None:
    return None if m.root.arg("dim") in (-1, _rank(m) - 1) else "only softmax over the last axis has a kernel"


def packable(m: Match, spec: QuantSpec) -> str | None:
    """Codes of 2, 4 or 8 bits in blocks along the rows of a known matrix."""
    weight = m.tensor("weight")
    if weight is None or weight.ndim != 2:
        return "the weight is not a matrix that is known"
    if packed_bits(spec.number_format) is None or spec.then is not None:
        return f"{spec} is not packed"
    axis = None if spec.axis is None else spec.axis % 2
    if spec.granularity == "block" or axis not in (None, 1 if spec.granularity == "group" else 0):
        return "blocks of packed weights run along the rows"
    if spec.granularity == "group" and spec.group_size not in BLOCKS:
        return f"blocks of packed weights have {', '.join(map(str, sorted(BLOCKS)))} values, not {spec.group_size}"
    return None


def whole_blocks(m: Match, spec: QuantSpec) -> str | None:
    refusal = packable(m, spec)
    if refusal is not None:
        return refusal
    row = m.tensor("weight").shape[1]
    size = block_size(spec, row)
    return None if row % size == 0 else f"a row of {row} values is not made of blocks of {size}"


def read_as_codes(m: Match) -> str | None:
    """The Q of the reader is moved in front of ops that only move data, to the product."""
    return _read_only_by(m.root.node, ("linear", "conv", "matmul"))


def read_by_softmax(m: Match) -> str | None:
    return _read_only_by(m.root.node, ("softmax",))


def _read_only_by(node: fx.Node, families: Sequence[str]) -> str | None:
    """Why a result is not read by one of these ops alone, directly or through ops that move data; or None."""
    if len(node.users) != 1:
        return "its result is read several times"
    reader = next(iter(node.users))
    if family_of(reader.target) in MOVING:
        return _read_only_by(reader, families)
    return None if family_of(reader.target) in families else f"its result goes to {family_of(reader.target)}"


MOVING = frozenset({"reshape", "transpose"})

# the softmax kernel multiplies by the whole part of 1 / scale, and overflows for finer scales over short axes
PROBABILITIES = (0.0, 255 / 256)

KERNELS = {
    # family              kernel found in the optimized model, role, what it asks for
    "conv": [Kernel("QLinearConv", "compute")],
    "linear": [
        Kernel("MatMulIntegerToFloat", "compute", output="optional", bias="float", when=no_bias),
        Kernel("QGemm", "compute", output="optional", when=rank_2),
        Kernel("MatMulIntegerToFloat", "compute", output="optional", bias="float", when=dynamic),
        Kernel("QGemm", "compute", output="optional"),
    ],
    "linear_activation": [
        # Gemm + Relu without a Q after it becomes a float FusedGemm
        Kernel("QGemm", "compute", when=matrix_with_bias),
    ],
    "matmul": [
        Kernel("QLinearMatMul", "compute", when=read_by_softmax),
        Kernel("QLinearMatMul", "compute", when=read_as_codes),
        Kernel("MatMulIntegerToFloat", "compute", output="optional"),
    ],
    "add": [Kernel("QLinearAdd", "between")],
    "mul": [Kernel("QLinearMul", "between")],
    "cat": [Kernel("QLinearConcat", "between")],
    "where": [Kernel("QLinearWhere", "between")],
    "avg_pool": [Kernel("QLinearAveragePool", "between")],
    "adaptive_avg_pool": [Kernel("QLinearGlobalAveragePool", "between", when=global_pool)],
    "sigmoid": [Kernel("QLinearSigmoid", "between")],
    "leaky_relu": [Kernel("QLinearLeakyRelu", "between")],
    "softmax": [Kernel("QLinearSoftmax", "between", when=last_axis_softmax, range=PROBABILITIES)],
    "max_pool": [Kernel("MaxPool", "carry")],
    "reshape": [Kernel("Reshape", "carry")],
    "transpose": [Kernel("Transpose", "carry")],
    "slice": [Kernel("Slice", "carry")],
    "expand": [Kernel("Expand", "carry")],
    "gather": [Kernel("Gather", "carry")],
    "tile": [Kernel("Tile", "carry")],
    "resize": [Kernel("Resize", "carry", when=nearest)],
}

DYNAMIC = {
    QuantSpec(format="uint8", symmetric=False, dynamic=True): {
        "linear": [Kernel("DynamicQuantizeMatMul", "compute", output="optional", bias="float")],
        "lstm": [Kernel("DynamicQuantizeLSTM", "compute", output="optional", bias="float")],
    },
    QuantSpec(format="int8", granularity="token", dynamic=True): {
        "linear": [Kernel("MatMulInteger", "compute", output="optional", bias="float")],
    },
}

FLOAT_REASONS = {
    "conv_transpose": "ONNX Runtime's CPU has no integer kernel for ConvTranspose",
    "layer_norm": "ONNX Runtime's CPU has no integer kernel for LayerNormalization",
    "rms_norm": "ONNX Runtime's CPU has no integer kernel for RMSNormalization",
    "group_norm": "ONNX Runtime's CPU has no integer kernel for GroupNormalization",
    "batch_norm": "a batch norm that no neighbour can take in has no integer kernel",
    "gelu": "ONNX Runtime's CPU has no integer kernel for Gelu",
    "silu": "Sigmoid and Mul have integer kernels, but two more roundings cost accuracy and gain no time",
    "hardswish": "ONNX Runtime's CPU has no integer kernel for HardSwish",
    "hardsigmoid": "ONNX Runtime's CPU has no integer kernel for HardSigmoid",
    "attention": "float unless a rule on 'attention' asks for integers and no flag makes it causal",
    "embedding": "no kernel reads its rows packed, and the table would be dequantized whole at every run",
    "lstm": "its kernel finds scales at run time, as int8_dynamic asks, and takes neither projections nor dropout",
    "gru": "ONNX Runtime's CPU has no integer kernel for GRU",
    "pad": "Pad has no integer kernel, and no convolution follows to take it in",
    "split": "Split runs on integers only with equal scales on all parts",
}

WEIGHT_ONLY = {
    "linear": [PackedKernel("MatMulNBits", packable)],
    "embedding": [PackedKernel("GatherBlockQuantized", whole_blocks)],
}

WEIGHT_ONLY_NOTES = {
    "conv": "the weights are dequantized at every run: smaller, not faster",
    "conv_transpose": "the weights are dequantized at every run: smaller, not faster",
    "embedding": "the whole table is dequantized at every run: smaller, not faster",
}


@cache
def saturates_here() -> bool:
    """Ask the installed runtime: does its u8·s8 matmul lose 255·127 + 255·127 to int16? True on x86 without VNNI."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.full((4, 1), 127, np.int8), "b")
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    a = helper.make_tensor_value_info("a", TensorProto.UINT8, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.INT32, [1, 1])
    model = helper.make_model(helper.make_graph([node], "probe", [a], [y], [weight]), ir_version=8)
    model.opset_import[0].version = 13
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return int(session.run(None, {"a": np.full((1, 4), 255, np.uint8)})[0][0, 0]) != 4 * 255 * 127


def _with(function: Callable[..., fx.GraphModule], **options: Any) -> Callable[[fx.GraphModule], fx.GraphModule]:
    """The function with these options, under its own name."""
    return update_wrapper(partial(function, **options), function)


CPUS = ("auto", "avx2", "vnni", "arm")


def cpu_named(cpu: str, target: str) -> str:
    """A kind of CPU by name; "auto" is this machine's. Raises TargetError for others."""
    if cpu not in CPUS:
        raise TargetError(f"unknown cpu {cpu!r} of target {target!r}", remedy=did_you_mean(cpu, CPUS))
    if cpu != "auto":
        return cpu
    arm = platform.machine().lower() in ("arm64", "aarch64")
    return "avx2" if saturates_here() else "arm" if arm else "vnni"


@TARGETS.register("onnxruntime")
def onnxruntime_target(
    cpu: str = "auto",
    accuracy_level: Literal[0, 4] = 4,
    form: Literal["qdq", "qoperator"] = "qdq",
    guard: bool | Literal["calibrated"] = True,
) -> Target:
    """The target for a kind of CPU: "avx2" (x86 without VNNI: u8·s8 saturates), "vnni", "arm", or "auto": this one.

    accuracy_level: of products with packed weights: 4 rounds their inputs to int8 in blocks (fast), 0 keeps them float.
    form: of the file: "qdq", which the runtime's optimizer fuses, or "qoperator", with integer kernels as its nodes.
    guard: on "avx2", choose weights that cannot saturate, whatever the input; "calibrated": for inputs up to 1.25 times
        those of calibration, channel by channel; False: saturation is simulated as it happens.
    """
    if form not in ("qdq", "qoperator"):
        raise TargetError(
            f"unknown form {form!r} of target 'onnxruntime'", remedy=did_you_mean(form, ("qdq", "qoperator"))
        )
    if accuracy_level not in (0, 4):
        raise TargetError(
            f"unknown accuracy_level {accuracy_level!r} of target 'onnxruntime'",
            remedy="0: inputs stay float; 4: they are rounded to int8 in blocks.",
        )
    if guard not in (True, False, "calibrated"):
        what = f"guard is true, false or 'calibrated', not {guard!r}"
        raise TargetError(what, where="target 'onnxruntime'", remedy="guard='calibrated'")
    cpu = cpu_named(cpu, "onnxruntime")
    return Target(
        name="onnxruntime",
        cpu=cpu,
        kernels=KERNELS,
        opens_attention=True,
        float_reasons=FLOAT_REASONS,
        weight_only_notes=WEIGHT_ONLY_NOTES,
        # x86 turns int8 activations into uint8 ones, under other names and with fewer fusions
        activation_formats=frozenset({"uint8", "int8"} if cpu == "arm" else {"uint8"}),
        weight_formats=frozenset(f"{sign}int{bits}" for sign in ("", "u") for bits in range(2, 9)),
        saturates=cpu == "avx2" and bool(guard),
        guards_by_data=guard == "calibrated",
        lowering=_with(lower_to_onnx_qdq if form == "qdq" else lower_to_onnx_qoperator, accuracy_level=accuracy_level),
        reference=_with(lower_to_integer_reference, accuracy_level=accuracy_level, saturating=cpu == "avx2"),
        weight_only=WEIGHT_ONLY,
        dynamic=DYNAMIC,
        options={"cpu": cpu, "accuracy_level": accuracy_level, "form": form, "guard": guard},
        executor="onnxruntime",
    )
