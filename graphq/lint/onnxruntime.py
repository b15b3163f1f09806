"""The rules of ONNX Runtime, and those that it shares with TensorRT.

What ONNX Runtime fuses was measured with version 1.32 on x86 (docs/target-onnxruntime.md); TensorRT's rules are those
of its documentation on explicit quantization.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import torch
from torch import Tensor

from graphq.lint.graph import Dequantized, Graph, attribute
from graphq.lint.rules import Finding, rule
from graphq.numerics.pairs import PAIR_LIMIT, along_k, heaviest_side

WEIGHTED = ("Conv", "Gemm", "MatMul")
MOVES = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "GatherElements", "Expand",
         "Tile", "MaxPool", "ReduceMax", "ReduceMin", "Resize", "DepthToSpace", "Split"}  # fmt: skip
INTEGER = {*WEIGHTED, *MOVES, "Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Softmax",
           "Concat", "Where", "ArgMax", "Relu", "Clip"}  # fmt: skip
TOLERANCE = 1e-3  # of a bias' scale


def _weighted(g: Graph) -> Iterator[tuple[onnx.NodeProto, Dequantized | None, Dequantized | None]]:
    """(op, its activation, its constant weight as dequantized)."""
    for node in g.nodes:
        if node.op_type in WEIGHTED:
            weight = g.dequantized(node.input[1])
            known = weight is not None and g.array(weight.codes) is not None
            yield node, g.dequantized(node.input[0]), weight if known else None


def output_axis(node: onnx.NodeProto, rank: int) -> int:
    """The axis of a weight's output channels."""
    if node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        return 0
    return rank - 1


@rule("onnxruntime", "tensorrt")
def weight_axis(g: Graph) -> Iterator[Finding]:
    """Scales of a weight that do not run along its output channels: fused all the same, with the scales on the wrong
    axis."""
    for node, _, weight in _weighted(g):
        if weight is None or not weight.per_axis:
            continue
        codes = g.array(weight.codes)
        assert codes is not None
        axis, wanted = weight.axis % codes.ndim, output_axis(node, codes.ndim)
        if axis != wanted:
            yield Finding(
                "weight_axis", g.label(node),
                f"its weight has a scale for each index of axis {axis}, its output channels are axis {wanted}: where "
                "the sizes are equal ONNX Runtime fuses it and scales the wrong axis, without a word",
                f"Quantize the weight along axis {wanted}; `--fix` makes it a float weight.", fixable=True,
            )  # fmt: skip


@rule("onnxruntime")
def bias_scale(g: Graph) -> Iterator[Finding]:
    """An int32 bias whose scale is not input times weight: a Gemm is fused as if it were, a Conv stays float."""
    for node, x, weight in _weighted(g):
        bias = g.dequantized(node.input[2]) if len(node.input) > 2 else None
        if bias is None or x is None or weight is None or node.op_type == "MatMul":
            continue
        codes = g.array(bias.codes)
        if codes is None or codes.dtype != np.int32 or any(s is None for s in (bias.scale, x.scale, weight.scale)):
            continue
        if x.scale.size != 1 or bias.scale.size not in (1, weight.scale.size):  # type: ignore[union-attr]
            continue  # another rule's
        wanted = x.scale.reshape(-1) * weight.scale.reshape(-1)  # type: ignore[union-attr]
        if not np.allclose(bias.scale.reshape(-1), wanted, rtol=TOLERANCE, atol=0):  # type: ignore[union-attr]
            effect = "ignores the scale of the bias" if node.op_type == "Gemm" else "leaves the convolution float"
            yield Finding(
                "bias_scale", g.label(node),
                f"its bias has another scale than input · weight: ONNX Runtime {effect}",
                "Quantize the bias with input scale · weight scale, or leave it float, as `--fix` does.", fixable=True,
            )  # fmt: skip


@rule("onnxruntime", "tensorrt")
def double_qdq(g: Graph) -> Iterator[Finding]:
    """A tensor that is quantized, dequantized and quantized again with the same numbers."""
    for node, source in second_quantizations(g):
        yield Finding(
            "double_qdq", g.label(node),
            f"it quantizes again, with the same numbers, what {g.label(source)} dequantized: two ops for nothing",
            "Remove the second pair, as `--fix` does.", fixable=True,
        )  # fmt: skip


@rule("onnxruntime")
def requantized(g: Graph) -> Iterator[Finding]:
    """A tensor that is dequantized and quantized again with other numbers: the optimizer makes one pair of the two."""
    for node in g.nodes:
        source = g.made.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if source is None or source.op_type != "DequantizeLinear" or g.made.get(source.input[0]) is None:
            continue
        if not _same(g, node, source):
            yield Finding(
                "requantized", g.label(node),
                f"the optimizer merges it with {g.label(source)}: values are off by up to the smaller step",
                "Quantize the tensor once.",
            )  # fmt: skip


def second_quantizations(g: Graph) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """(QuantizeLinear, the DequantizeLinear that it reads) with equal scale, zero point and type."""
    for node in g.nodes:
        source = g.made.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if source is None or source.op_type != "DequantizeLinear" or _leave(g, [node]):
            continue
        if _same(g, node, source):
            yield node, source


def _same(g: Graph, a: onnx.NodeProto, b: onnx.NodeProto) -> bool:
    p, q = g.quantization(a), g.quantization(b)
    if p.scale is None or q.scale is None or p.zero is None or q.zero is None or (p.axis, p.block) != (q.axis, q.block):
        return False
    return bool(np.array_equal(p.scale, q.scale) and p.zero.dtype == q.zero.dtype and np.array_equal(p.zero, q.zero))


@rule("onnxruntime", "tensorrt")
def channel_activation(g: Graph) -> Iterator[Finding]:
    """Activations with a scale per channel: no kernel takes them."""
    for node in g.nodes:
        if node.op_type == "QuantizeLinear" and g.array(node.input[0]) is None and g.quantization(node).per_axis:
            yield Finding(
                "channel_activation", g.label(node),
                "an activation has a scale per channel: no integer kernel takes it, some fail at run time",
                "Quantize activations with one scale.",
            )  # fmt: skip


@rule("onnxruntime")
def zero_point(g: Graph) -> Iterator[Finding]:
    """A missing zero point: it means zero, but ops that only move data are then not done on integers."""
    for node in g.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not g.has_zero(node):
            if attribute(node, "output_dtype", 0):
                continue
            yield Finding(
                "zero_point", g.label(node),
                "it has no zero point: ONNX Runtime does not drop such pairs around Transpose, Reshape and their like",
                "Give it a zero point of 0, as `--fix` does.", fixable=g.code_type(node) is not None,
            )  # fmt: skip


@rule("onnxruntime")
def several_quantizations(g: Graph) -> Iterator[Finding]:
    """A result that is quantized and also read as float, or quantized twice: the op that makes it is not fused."""
    for name, equal in several_quantized(g):
        maker, others = g.made[name], len(g.readers[name]) - 1 + (name in g.outputs)
        yield Finding(
            "several_quantizations", g.label(maker),
            f"its result {name} is quantized and read by {others} others beside: ONNX Runtime fuses an op only with "
            "the one QuantizeLinear that reads it",
            "Let all read the dequantized value of one QuantizeLinear" + (", as `--fix` does." if equal else "."),
            fixable=equal,
        )  # fmt: skip


def several_quantized(g: Graph) -> Iterator[tuple[str, bool]]:
    """(result of an op on integers that is quantized and read by others beside, are they all one quantization?)."""
    for name, readers in g.readers.items():
        maker = g.made.get(name)
        quantizers = [r for r in readers if r.op_type == "QuantizeLinear"]
        if maker is None or not quantizers or maker.op_type not in INTEGER or not _on_integers(g, maker):
            continue
        if len(readers) == 1 and name not in g.outputs:
            continue
        alone = len(quantizers) == len(readers) and name not in g.outputs and not _leave(g, quantizers[1:])
        yield name, alone and all(_same(g, quantizers[0], q) for q in quantizers)


def _leave(g: Graph, nodes: list[onnx.NodeProto]) -> bool:
    """Is a result of these an output of the model, which keeps its maker?"""
    return any(o in g.outputs for n in nodes for o in n.output)


def _on_integers(g: Graph, node: onnx.NodeProto) -> bool:
    """Does an op, or the op behind its activation function, read dequantized values?"""
    if node.op_type in ("Relu", "Clip"):
        before = g.made.get(node.input[0])
        return before is not None and _on_integers(g, before)
    return g.dequantized(node.input[0]) is not None


@rule("onnxruntime")
def no_kernel(g: Graph) -> Iterator[Finding]:
    """An op between DequantizeLinear and QuantizeLinear that has no integer kernel: two roundings for nothing."""
    for node in g.nodes:
        if node.op_type in INTEGER or node.op_type in ("QuantizeLinear", "DequantizeLinear") or not node.output:
            continue
        reads = [n for n in node.input if n and g.array(n) is None]
        if not reads or not all(g.dequantized(n) is not None for n in reads):
            continue
        quantized = g.sole_reader(node.output[0])
        if quantized is None or quantized.op_type != "QuantizeLinear":
            continue
        if not (all(_needed_before(g, n) for n in reads) and _needed_after(g, quantized)):
            yield Finding(
                "no_kernel", g.label(node),
                f"ONNX Runtime's CPU has no integer {node.op_type}: its inputs and its result are rounded, and it "
                "computes in float",
                "Do not quantize around this op.",
            )  # fmt: skip


def _needed_before(g: Graph, name: str) -> bool:
    """Is a dequantized value the result of an integer kernel, which wants its Q?"""
    given = g.dequantized(name)
    quantize = g.made.get(given.codes) if given is not None else None
    maker = g.made.get(quantize.input[0]) if quantize is not None and quantize.op_type == "QuantizeLinear" else None
    return maker is not None and maker.op_type in INTEGER and _on_integers(g, maker)


def _needed_after(g: Graph, quantize: onnx.NodeProto) -> bool:
    """Do integer kernels read what is quantized here?"""
    dequantized = [r for r in g.readers.get(quantize.output[0], []) if r.op_type == "DequantizeLinear"]
    readers = [r for d in dequantized for r in g.readers.get(d.output[0], [])]
    return bool(readers) and all(r.op_type in INTEGER for r in readers)


@rule("onnxruntime", "tensorrt")
def float_weight(g: Graph) -> Iterator[Finding]:
    """A quantized input beside a float weight: the op computes in float, or the runtime chooses the codes."""
    for node in g.nodes:
        if node.op_type in WEIGHTED and g.dequantized(node.input[0]) is not None and g.array(node.input[1]) is not None:
            yield Finding(
                "float_weight", g.label(node),
                "its input is quantized and its weight is a float constant (folded by an optimizer?): it computes in "
                "float; where the result is quantized, ONNX Runtime quantizes the weight itself, with one scale",
                "Quantize the weight too, or leave the input float.",
            )  # fmt: skip


@rule("onnxruntime")
def float_result(g: Graph) -> Iterator[Finding]:
    """A convolution of integers whose result is not quantized: it computes in float."""
    for node, x, weight in _weighted(g):
        if node.op_type != "Conv" or x is None or weight is None:
            continue
        last = node
        reader = g.sole_reader(node.output[0])
        if reader is not None and reader.op_type in ("Relu", "Clip"):
            last = reader
        if not any(r.op_type == "QuantizeLinear" for r in g.readers.get(last.output[0], [])):
            yield Finding(
                "float_result", g.label(node),
                "its result is not quantized: ONNX Runtime has no integer convolution with a float result",
                "Quantize the result, or leave this convolution float.",
            )  # fmt: skip


@rule("onnxruntime")
def relu_zero_point(g: Graph) -> Iterator[Finding]:
    """A Relu before a QuantizeLinear whose codes go below zero: it is not folded into the op before it."""
    for node in g.nodes:
        if node.op_type != "Relu":
            continue
        before, after = g.made.get(node.input[0]), g.sole_reader(node.output[0])
        alone = g.dequantized(node.input[0]) is not None
        if before is None or not (alone or (before.op_type in WEIGHTED and g.dequantized(before.input[0]) is not None)):
            continue
        if after is None or after.op_type != "QuantizeLinear":
            continue
        zero = g.quantization(after).zero
        if zero is None or not np.issubdtype(zero.dtype, np.integer):
            continue
        lowest = np.iinfo(zero.dtype).min
        if (zero != lowest).any():
            effect = "it computes in float" if alone else f"the {before.op_type} before it computes in float with it"
            yield Finding(
                "relu_zero_point", g.label(node),
                f"its result is quantized with zero point {zero.reshape(-1)[0]}, needs {lowest}: it is not folded, and "
                f"{effect}",
                f"Quantize the result of the Relu asymmetrically (zero point {lowest}).",
            )  # fmt: skip


@rule("onnxruntime")
def saturation(g: Graph) -> Iterator[Finding]:
    """Signed weights whose neighbours add up beyond int16 with uint8 inputs, on x86 CPUs without VNNI."""
    for node, x, weight in _weighted(g):
        if x is None or weight is None or _depthwise(node, g.array(weight.codes)):
            continue
        codes = g.array(weight.codes)
        if codes is None or codes.dtype != np.int8:
            continue
        share = (heaviest_side(rows_of(node, codes)) > PAIR_LIMIT).double().mean().item()
        if share:
            yield Finding(
                "saturation", g.label(node),
                f"{share:.1%} of its pairs of weights can drive the int16 sums of AVX2 kernels over their end",
                "Quantize with graphq for cpu 'avx2', with reduce_range, or run with session.x64quantprecision = 1.",
            )  # fmt: skip


def _depthwise(node: onnx.NodeProto, codes: np.ndarray | None) -> bool:
    return node.op_type == "Conv" and codes is not None and codes.shape[1] == 1


def rows_of(node: onnx.NodeProto, codes: np.ndarray) -> Tensor:
    """[out, K] in the order in which kernels add up."""
    weight = torch.from_numpy(codes.astype(np.int32))
    if node.op_type != "Conv" and output_axis(node, weight.ndim) != 0:
        weight = weight.transpose(-1, -2).reshape(-1, weight.shape[-2])
    return along_k(weight)
