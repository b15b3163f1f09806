"""Quantization patterns and what comes after them, on graphs that are generated from the patterns."""

import pytest
import torch

import graphq
from graphq.calibration.watch import watching
from graphq.config import QuantConfig
from graphq.graph import elementwise_ops, integer_ops
from graphq.graph.decision import decision_of
from graphq.graph.ops import DEQUANTIZE
from graphq.graph.view import parameter
from graphq.numerics.pairs import along_k
from graphq.passes.lowering.integer_reference import lower_to_integer_reference
from graphq.passes.lowering.onnx_qdq import lower_to_onnx_qdq
from graphq.passes.patterns import PATTERNS
from graphq.passes.patterns.weighted import Conv, Linear
from graphq.passes.placement import (
    annotate,
    correct_bias,
    guard_saturation,
    insert_quantizers,
    mean_products,
    mean_watchers,
    quantize_bias,
    to_qdq,
)
from graphq.passes.placement.edges import quantizer_at, quantizer_calls
from graphq.passes.targets import get_target
from graphq.passes.targets.onnxruntime import KERNELS
from graphq.quantizer import quantizers
from graphq.testing import Unfit, prove

INTEGER = {v for ops in (integer_ops, elementwise_ops) for k, v in vars(ops).items() if k.startswith("Q")}
COMPUTING = [p for p in PATTERNS if any(k.role == "compute" for k in KERNELS.get(p.family, ()))]
TARGET = get_target("onnxruntime", cpu="vnni")
EVERYTHING = QuantConfig.load("int8").model_copy(update={"rules": QuantConfig.load("int8").rules[:1]})


def place(gm):
    annotate(gm, EVERYTHING, TARGET)
    insert_quantizers(gm)
    return len(quantizers(gm))


@pytest.mark.parametrize("pattern", COMPUTING, ids=lambda p: p.__name__)
def test_placing_quantizers_changes_nothing_until_they_are_calibrated(pattern):
    assert prove(pattern, transform=place, equivalence="exact", examples=30).rewritten > 5


def calibrated(gm, config=EVERYTHING):
    """Calibrated on its own inputs."""
    inputs = gm.meta["graphq_example"].args
    if any(t.dtype != torch.float32 for t in inputs) or not inputs:
        raise Unfit
    prepared = graphq.prepare(gm, config, target=TARGET)
    if not quantizers(prepared):
        raise Unfit
    return graphq.calibrate(prepared, [inputs], progress=False)


def converted(gm):
    return graphq.convert(calibrated(gm))


def become(gm, other):
    """Let a graph be what a pass returned as a new one."""
    gm.graph = other.graph
    for name, module in other.named_children():
        setattr(gm, name, module)
    for name, buffer in other.named_buffers(recurse=False):
        gm.register_buffer(name, buffer)
    return 1


@pytest.mark.parametrize("pattern", COMPUTING, ids=lambda p: p.__name__)
def test_lowering_to_the_form_of_onnx_changes_nothing(pattern):
    def lower(gm):
        return become(gm, lower_to_onnx_qdq(gm))

    assert prove(pattern, given=converted, transform=lower, equivalence="ulp", examples=30).rewritten > 5


@pytest.mark.parametrize("pattern", COMPUTING, ids=lambda p: p.__name__)
def test_converting_gives_what_the_calibrated_graph_simulates(pattern):
    def convert(gm):
        to_qdq(gm)
        return 1

    assert prove(pattern, given=calibrated, transform=convert, equivalence="exact", examples=15).rewritten > 5


def codes(gm):
    """A converted graph that gives the codes before its last dequantize, as kernels do."""
    gm = converted(gm)
    (output,) = gm.graph.find_nodes(op="output")
    output.args = (tuple(n.args[0] if n.target is DEQUANTIZE else n for n in output.args[0]),)
    gm.recompile()
    return gm


@pytest.mark.parametrize("pattern", COMPUTING, ids=lambda p: p.__name__)
def test_the_integer_reference_is_at_most_one_code_from_the_simulation(pattern):
    def lower(gm):
        reference = lower_to_integer_reference(gm)
        return become(gm, reference) if any(n.target in INTEGER for n in reference.graph.nodes) else 0

    assert prove(pattern, given=codes, transform=lower, equivalence="one_lsb", examples=12).rewritten > 5


BIASED = [Conv, Linear]  # with padding or an activation in the pattern, weight and bias are the same


@pytest.mark.parametrize("pattern", BIASED, ids=lambda p: p.__name__)
def test_int32_codes_of_a_fitted_bias_are_half_a_step_from_it_at_most(pattern):
    """fit_bias has run in calibrate; without it a dead channel's scale lets the codes overflow."""

    def transform(gm):
        biases = {n.name: parameter(gm, decision_of(n).bias) for n in gm.graph.nodes if decision_of(n)}
        quantize_bias(gm)
        added = [n for n in gm.graph.nodes if n.target is DEQUANTIZE]
        for node in added:
            codes, scale, _ = (parameter(gm, a).double() for a in node.args[:3])
            (op,) = node.users
            assert codes.abs().max() <= 2**30 + 1
            assert ((codes * scale - biases[op.name].double()).abs() <= 0.5001 * scale).all()
        return len(added)

    assert prove(pattern, given=calibrated, transform=transform, equivalence="lossy", examples=12).rewritten > 5


@pytest.mark.parametrize("pattern", BIASED, ids=lambda p: p.__name__)
def test_after_the_guard_no_pair_of_weights_can_saturate(pattern):
    def guard(gm):
        guarded = guard_saturation(gm)
        for node in gm.graph.nodes:
            if node.name in guarded:
                _, call = quantizer_calls(decision_of(node))
                weight, scale = parameter(gm, call.args[0]), quantizer_at(gm, call).scale
                rows = along_k(weight) / scale.reshape(-1, 1)
                pairs = torch.nn.functional.pad(rows.round(), [0, rows.shape[1] % 2]).unflatten(1, (-1, 2))
                heaviest = max(pairs.clamp(min=0).sum(-1).max(), (-pairs).clamp(min=0).sum(-1).max())
                assert 255 * heaviest <= 2**15 - 1
        return len(guarded)

    assert prove(pattern, given=calibrated, transform=guard, equivalence="lossy", examples=12).rewritten > 5


@pytest.mark.parametrize("pattern", BIASED, ids=lambda p: p.__name__)
def test_a_corrected_bias_gives_back_the_mean_product_of_the_float_weights(pattern):
    def correct(gm):
        watchers = mean_watchers(gm)
        states = {q: q.state for q in quantizers(gm).values()}
        for q in states:
            q.state = "off"
        with watching(gm, [(n, w) for (n, _), w in watchers.items()]):
            gm(*gm.meta["graphq_example"].args)
        wanted = mean_products(gm, watchers)
        for q, state in states.items():
            q.state = state
        before = {n: parameter(gm, decision_of(node).bias).clone() for n, node in by_name(gm, wanted)}
        correct_bias(gm, watchers, wanted)
        after = mean_products(gm, watchers)
        for name, node in by_name(gm, wanted):
            shift = parameter(gm, decision_of(node).bias).double() - before[name].double()
            torch.testing.assert_close(after[name] + shift, wanted[name], rtol=1e-5, atol=1e-5)
        return len(wanted)

    assert prove(pattern, given=calibrated, transform=correct, equivalence="lossy", examples=12).rewritten > 5


def by_name(gm, names):
    return [(n.name, n) for n in gm.graph.nodes if n.name in names]
