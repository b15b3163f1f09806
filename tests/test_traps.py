"""The traps of quantized runtimes, each shown: what the naive way gives, and what graphq does instead.

The numbers are those of the list of traps in docs/traps.md.
"""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

import graphq
from graphq.config.presets import ACTIVATION_UINT8, WEIGHT_INT8
from graphq.errors import TargetError
from graphq.evaluate.taps import optimized_model, session
from graphq.graph.ops import QUANTIZE
from graphq.lint import fix, lint
from graphq.numerics.packing import pack, unpack
from graphq.passes.targets.onnxruntime import saturates_here
from onnx_build import RNG, Build


class Lambda(nn.Module):
    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


def quantized(model, data, tmp_path, config="int8", target="onnxruntime", **options):
    graph = graphq.quantize(model.eval(), config, data, target=target, progress=False, **options)
    return graph, graphq.export(graph, tmp_path / "model.onnx")


def config_of(**specs):
    return graphq.QuantConfig(rules=(graphq.Rule(select="*", scheme=graphq.Scheme(**specs)),))


def run(model, x, *, optimize=True):
    return session(model.SerializeToString(), optimize=optimize).run(None, {"x": x})[0]


def kernels(path):
    return [n.op_type for n in optimized_model(path).graph.node]


def quality(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return 10 * np.log10((a**2).sum() / max(((a - b) ** 2).sum(), 1e-30))


@pytest.mark.skipif(not saturates_here(), reason="this CPU adds in int32")
def test_1_int16_sums_saturate(tmp_path):
    model, data = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU()), [torch.rand(2, 16, 9, 9) for _ in range(3)]
    with torch.no_grad():
        model[0].weight.copy_(torch.rand_like(model[0].weight) * 0.5 + 0.5)
    figures = {}
    for guard in (False, True):
        place = graphq.get_target("onnxruntime", guard=guard)
        graph, path = quantized(model, data, tmp_path, target=place)
        figures[guard] = quality(model(data[0]).detach(), session(path).run(None, {"input": data[0].numpy()})[0])
        assert bool(lint(onnx.load(path), saturates=True)) is not guard
        assert graphq.verify(graph, path, data).agrees  # either way it is simulated
    assert figures[True] > 30 > figures[False]


def test_2_rounding_is_half_to_even_and_the_infinite_saturates():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, np.inf, -np.inf, 300.5], np.float32)
    scale, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    ours = QUANTIZE(torch.from_numpy(x), scale, zero, [], "uint8").numpy()
    b = Build([8])
    tail = [b.constant("s", 1.0, np.float32), b.constant("z", 0, np.uint8)]
    b.node("DequantizeLinear", [b.node("QuantizeLinear", ["x", *tail], "q"), *tail], "y")
    assert np.array_equal(ours, run(b.model(), x))
    naive = np.clip(np.floor(x + 0.5), 0, 255)
    assert not np.array_equal(naive, ours)


def test_3_kernels_requantize_with_one_float_multiplier(tmp_path):
    naive = []
    for seed in range(4):  # ties are rare
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1))
        data = [torch.randn(16, 3, 40, 40) for _ in range(3)]
        graph, path = quantized(model, data, tmp_path)
        result = graphq.verify(graph, path, data)
        assert result.share_equal == 1 and result.largest == 0
        literal = graphq.get_target("openvino")  # its reference is the float simulation
        graph.meta["graphq_target"] = replace(graph.meta["graphq_target"], reference=literal.reference)
        naive.append(graphq.verify(graph, path, data).share_equal)
        if naive[-1] < 1:
            break
    assert naive[-1] < 1


def test_4_a_missing_zero_point_keeps_a_move_from_running_on_codes():
    b = Build([4, 16])
    b.node("Transpose", [b.qdq("x", "xd", with_zero=False)], "y", perm=[1, 0])
    b.qdq("y", "yd", with_zero=False)
    assert {f.rule for f in lint(b.model())} == {"zero_point"}
    assert not lint(fix(b.model())[0])


def test_5_a_bias_of_a_dead_channel_leaves_int32(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1] = 1e-12
        model[0].bias[1] = 3.0
    data = [torch.rand(16, 8) for _ in range(3)]
    smallest = 1e-12 / 127 * (1 / 255)
    assert 3.0 / smallest > 2**31  # the naive code
    graph, path = quantized(model, data, tmp_path)
    assert graphq.compare(model, graph, data, per_op=False).sqnr > 30
    assert graphq.verify(graph, path, data).agrees


def test_6_a_residual_sum_wants_both_operands_here_and_one_there(tmp_path):
    model = Lambda(
        lambda m, x: m.b(F.relu(m.a(F.relu(x)) + F.relu(x))),
        a=nn.Conv2d(4, 4, 3, padding=1), b=nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    data = [torch.randn(2, 4, 8, 8) for _ in range(2)]
    counts = {}
    for target in ("onnxruntime", "tensorrt"):
        _, path = quantized(model, data, tmp_path, target=target)
        nodes = onnx.load(path).graph.node
        made = {o: n.op_type for n in nodes for o in n.output}
        add = next(n for n in nodes if n.op_type == "Add")
        counts[target] = sum(made[i] == "DequantizeLinear" for i in add.input)
        if target == "onnxruntime":
            assert "QLinearAdd" in kernels(path)
    assert counts == {"onnxruntime": 2, "tensorrt": 1}


def test_7_concatenation_runs_on_codes_of_different_scales(tmp_path):
    model = Lambda(
        lambda m, x: m.c(torch.cat([F.relu(m.a(x)), 50 * F.relu(m.b(x))], 1)),
        a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    model = Lambda(lambda m, x: m.c(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)), a=model.a, b=model.b, c=model.c)
    with torch.no_grad():
        model.b.weight.mul_(50)
    data = [torch.randn(2, 3, 6, 6) for _ in range(3)]
    graph, path = quantized(model, data, tmp_path)
    assert "QLinearConcat" in kernels(path) and not graphq.explain(graph, path).disagreements
    assert graphq.verify(graph, path, data).largest <= 1


def test_8_pooling_runs_on_codes_where_its_scales_are_one(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1))
    _, path = quantized(model, [torch.randn(2, 3, 9, 9) for _ in range(2)], tmp_path)
    nodes = optimized_model(path).graph.node
    pool = next(n for n in nodes if n.op_type == "MaxPool")
    made = {o: n.op_type for n in nodes for o in n.output}
    assert made[pool.input[0]] == "QLinearConv"  # codes, not floats
    b = Build([1, 4, 8, 8])
    b.node("MaxPool", [b.qdq("x", "xd", 0.02)], "y", kernel_shape=[2, 2])
    b.qdq("y", "yd", 0.03)
    assert not any(n.op_type == "MaxPool" and "_q" in n.input[0] for n in _optimized(b.model(), tmp_path))


def _optimized(model, folder):
    onnx.save(model, folder / "other.onnx")
    return optimized_model(folder / "other.onnx").graph.node


def test_9_scales_along_the_wrong_axis_are_fused_without_a_word():
    b = Build([1, 8, 6, 6])
    b.node("Conv", [b.qdq("x", "xd"), b.weight("w", (8, 8, 3, 3), axis=1)], "y", kernel_shape=[3, 3])
    b.qdq("y", "yd", 0.05)
    model, x = b.model(), RNG.uniform(-2, 2, (1, 8, 6, 6)).astype(np.float32)
    steps = np.abs(run(model, x) - run(model, x, optimize=False)) / 0.05
    assert steps.max() > 2 and [f.rule for f in lint(model)] == ["weight_axis"]
    repaired = fix(model)[0]
    assert np.array_equal(run(repaired, x, optimize=False), run(model, x, optimize=False))
    if not saturates_here():  # the runtime quantizes the float weight itself, with codes up to 127
        assert (np.abs(run(repaired, x) - run(model, x, optimize=False)) / 0.05).max() <= 1.01


def test_10_the_narrow_range_is_kept(tmp_path):
    model, data = nn.Linear(16, 8), [torch.randn(4, 16) for _ in range(2)]
    graph, path = quantized(model, data, tmp_path)
    codes = [numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer if i.data_type == 3]
    weights = next(c for c in codes if c.ndim == 2)
    assert weights.min() >= -127 and graphq.verify(graph, path, data).agrees


def test_11_symmetric_codes_keep_a_relu_from_fusing(tmp_path):
    b = Build([1, 3, 8, 8])
    b.node("Conv", [b.qdq("x", "xd", zero=0, dtype=np.int8), b.weight("w", (4, 3, 3, 3), axis=0)], "y")
    b.node("Relu", ["y"], "r")
    b.qdq("r", "rd", zero=0, dtype=np.int8)
    assert "QLinearConv" not in [n.op_type for n in _optimized(b.model(), tmp_path)]
    assert "relu_zero_point" in [f.rule for f in lint(b.model())]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 3), nn.ReLU())
    graph, path = quantized(model, [torch.randn(2, 3, 8, 8) for _ in range(2)], tmp_path)
    assert graphq.explain(graph, path).kernels() == {"QLinearConv": 2}


def test_12_a_batch_norm_is_folded_before_ranges_are_observed(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    model[1].running_var.mul_(100)
    model[1].running_mean.add_(3)
    graph, path = quantized(model, [torch.randn(8, 8) for _ in range(2)], tmp_path)
    assert not any("norm" in str(n.target) for n in graph.graph.nodes)
    assert set(graphq.explain(graph, path).kernels()) == {"QGemm"}


def test_13_two_quantizations_in_a_row_become_one(tmp_path):
    b = Build([4, 16])
    b.node("MatMul", [b.qdq(b.qdq("x", "xd", 0.02), "xdd", 0.05), b.weight("w", (16, 8), axis=1)], "y")
    model, x = b.model(), RNG.uniform(-2, 2, (4, 16)).astype(np.float32)
    assert np.abs(run(model, x) - run(model, x, optimize=False)).max() > 1e-3
    assert [f.rule for f in lint(model)] == ["requantized"]
    graph = graphq.convert(
        graphq.calibrate(
            graphq.prepare(nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(8, 4)), "int8", (torch.randn(4, 8),)),
            [torch.randn(4, 8)],
            progress=False,
        )
    )
    assert not lint(onnx.load(graphq.export(graph, tmp_path / "m.onnx")))


def test_14_a_product_with_factors_is_computed_with_them(tmp_path):
    model = Lambda(
        lambda m, x: torch.addmm(m.bias, x, m.weight, beta=2.0, alpha=0.5),
        weight=nn.Parameter(torch.randn(8, 4)), bias=nn.Parameter(torch.randn(4)),
    )  # fmt: skip
    data = [torch.randn(6, 8) for _ in range(3)]
    graph, path = quantized(model, data, tmp_path)
    assert quality(model(data[0]).detach(), session(path).run(None, _feed(path, data[0]))[0]) > 30
    assert not graphq.explain(graph, path).disagreements


def _feed(path, *arrays):
    return {i.name: np.asarray(a) for i, a in zip(session(path).get_inputs(), arrays, strict=True)}


def test_15_activations_per_channel_fail_at_run_time_and_are_refused():
    b = Build([1, 3, 8, 8])
    x = b.qdq("x", "xd", np.full(3, 0.02), axis=1)
    b.node("Conv", [x, b.weight("w", (4, 3, 3, 3), axis=0)], "y", kernel_shape=[3, 3])
    b.qdq("y", "yd", 0.05)
    model = b.model()
    with pytest.raises(Exception, match=r"(?i)scale|QLinearConv"):
        run(model, np.zeros((1, 3, 8, 8), np.float32))
    assert "channel_activation" in [f.rule for f in lint(model)]
    spec = ACTIVATION_UINT8.model_copy(update={"granularity": "channel", "axis": 1})
    with pytest.raises(TargetError, match="scale per channel"):
        graphq.prepare(nn.Conv2d(3, 4, 3), config_of(weight=WEIGHT_INT8, input=spec), (torch.randn(1, 3, 8, 8),))


def test_16_weights_stay_codes_in_the_file_and_in_the_runtime(tmp_path):
    model, data = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), [torch.randn(4, 64)]
    _, path = quantized(model, data, tmp_path)
    for made in (onnx.load(path), optimized_model(path)):
        large = [numpy_helper.to_array(i).dtype for i in made.graph.initializer if np.prod(i.dims) >= 64 * 64]
        assert large and set(large) <= {np.dtype(np.int8), np.dtype(np.uint8)}


def test_17_a_tied_table_has_the_axis_of_each_reader(tmp_path):
    table = nn.Embedding(4000, 32)
    head = nn.Linear(32, 4000, bias=False)
    head.weight = table.weight
    model = Lambda(lambda m, ids: m.head(m.table(ids)), table=table, head=head)
    ids = torch.randint(0, 4000, (2, 5))
    _, path = quantized(model, [(ids,)], tmp_path, "int8_weight_only")
    assert quality(model(ids).detach(), session(path).run(None, _feed(path, ids))[0]) > 35
    packed = [i for i in onnx.load(path).graph.initializer if np.prod(i.dims) >= 4000 * 32]
    assert len(packed) == 1


def test_18_batches_of_other_sizes_run_and_shapes_are_not_quantized(tmp_path):
    model = Lambda(lambda m, x: m.b(m.a(x).reshape(x.shape[0], -1)), a=nn.Conv2d(3, 4, 3), b=nn.Linear(144, 5))
    data = [torch.randn(n, 3, 8, 8) for n in (4, 4, 2)]
    graph, path = quantized(model, data, tmp_path)
    for count in (1, 3, 7):
        x = torch.randn(count, 3, 8, 8)
        assert session(path).run(None, _feed(path, x))[0].shape == (count, 5)
        assert graphq.verify(graph, path, [x]).agrees
    assert not graphq.explain(graph, path).undecided


def test_19_weights_beyond_a_protobuf_go_into_a_file_of_their_own(tmp_path, monkeypatch):
    import importlib

    monkeypatch.setattr(importlib.import_module("graphq.export.onnx"), "EXTERNAL_DATA_BYTES", 1000)
    model, data = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), [torch.randn(4, 64)]
    graph, path = quantized(model, data, tmp_path)
    assert (tmp_path / "model.onnx.data").exists() and path.stat().st_size < 20_000
    assert graphq.verify(graph, path, data).agrees


def test_20_softmax_on_codes_does_not_wrap_and_16_bits_have_no_kernel(tmp_path):
    model = Lambda(
        lambda m, x: torch.matmul(torch.softmax(m.q(x), -1), m.v(x)), q=nn.Linear(8, 6), v=nn.Linear(8, 6)
    )  # fmt: skip
    data = [torch.randn(6, 8) * 3 for _ in range(3)]
    config = config_of(weight=WEIGHT_INT8, input=ACTIVATION_UINT8, output=ACTIVATION_UINT8)
    graph, path = quantized(model, data, tmp_path, config, dynamic_shapes=None)
    assert "QLinearSoftmax" in kernels(path) and graphq.verify(graph, path, data).largest <= 1
    wide = config_of(weight=WEIGHT_INT8, input=ACTIVATION_UINT8.model_copy(update={"format": "uint16"}))
    with pytest.raises(TargetError, match="no kernels for uint16"):
        graphq.prepare(nn.Linear(8, 8), wide, (torch.randn(2, 8),))


def test_21_masks_and_constants_leave_scales_usable(tmp_path):
    def attend(m, x, mask):
        scores = torch.matmul(m.q(x), x.transpose(-1, -2)) + mask
        return m.out(torch.softmax(scores, -1) @ x + m.dead(x))

    dead = nn.Linear(8, 8)
    nn.init.zeros_(dead.weight)
    nn.init.constant_(dead.bias, 0.0)
    model = Lambda(attend, q=nn.Linear(8, 8), out=nn.Linear(8, 8), dead=dead)
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf"))
    data = [(torch.randn(6, 8), mask) for _ in range(3)]
    config = config_of(weight=WEIGHT_INT8, input=ACTIVATION_UINT8)
    _, path = quantized(model, data, tmp_path, config, dynamic_shapes=None)
    scales = [float(numpy_helper.to_array(i).max()) for i in onnx.load(path).graph.initializer if "scale" in i.name]
    assert scales and all(1e-9 < s < 1e3 for s in scales)
    expected = model(*data[0]).detach()
    assert quality(expected, session(path).run(None, _feed(path, *data[0]))[0]) > 20


@pytest.mark.parametrize("saturate", [True, False])
def test_22_fp8_saturates_or_not_as_the_file_says(saturate, tmp_path):
    spec = graphq.QuantSpec(format="fp8_e4m3", saturate=saturate)
    weight = graphq.QuantSpec(format="fp8_e4m3", granularity="channel")
    model, data = nn.Linear(8, 4), [torch.rand(4, 8)]
    graph, path = quantized(model, data, tmp_path, config_of(weight=weight, input=spec), "onnx")
    node = next(n for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear")
    said = {a.name: a.i for a in node.attribute}.get("saturate", 1)
    assert said == int(saturate)
    beyond = graph(data[0] * 1000)
    assert bool(torch.isfinite(beyond).all()) is saturate


def test_23_codes_of_four_bits_lie_low_nibble_first_and_odd_rows_fit(tmp_path):
    codes = torch.tensor([[[1, 2, 3]]])
    assert pack(codes, 4).flatten().tolist() == [0x21, 0x03]
    assert unpack(pack(codes, 4), 4, 3).flatten().tolist() == [1, 2, 3]
    weight = graphq.QuantSpec(format="uint4", symmetric=False, granularity="group", group_size=32, ragged=True)
    model, data = nn.Linear(45, 7), [torch.randn(4, 45)]
    graph, path = quantized(model, data, tmp_path, config_of(weight=weight))
    assert "MatMulNBits" in kernels(path) and graphq.verify(graph, path, data).agrees


def test_24_the_rounding_of_inputs_to_packed_weights_is_written_down_and_simulated(tmp_path):
    model, data = nn.Linear(64, 16), [torch.randn(8, 64)]
    errors = {}
    for level in (0, 4):
        place = graphq.get_target("onnxruntime", accuracy_level=level)
        graph, path = quantized(model, data, tmp_path, "int8_weight_only", place)
        node = next(n for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits")
        assert {a.name: a.i for a in node.attribute}["accuracy_level"] == level
        found = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
            None, _feed(path, data[0])
        )[0]
        errors[level] = quality(graph(data[0]).detach(), found)
        assert graphq.verify(graph, path, data).agrees
    assert errors[0] > 90 > errors[4]  # the codes alone say nothing of it: the kernel's reference does
