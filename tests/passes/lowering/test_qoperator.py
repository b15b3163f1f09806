"""Models in QOperator form, and the int16 sums of x86 without VNNI: the reference gives the runtime's integers."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import graphq
import zoo
from graphq.graph.integer_ops import QCONV, QGEMM
from graphq.numerics.pairs import along_k, lost_to_int16
from graphq.passes.targets.onnxruntime import saturates_here


class Between(nn.Module):
    """Products of elements, concatenation, pooling and activations between convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.joined, self.last = nn.Conv2d(24, 8, 1), nn.Linear(8, 6)

    def forward(self, x):
        x = nn.functional.leaky_relu(self.first(x), 0.1)
        y = torch.sigmoid(self.second(x))
        z = nn.functional.avg_pool2d(y * x, 3, stride=1, padding=1)
        joined = self.joined(torch.cat([x, y, z], 1)) * z
        return self.last(nn.functional.adaptive_avg_pool2d(joined, 1).flatten(1).softmax(-1))


class Moves(nn.Module):
    """Rows chosen, repeated and mixed between convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.register_buffer("rows", torch.tensor([2, 0, 1, 5]))

    def forward(self, x):
        x = self.first(x)
        chosen = self.second(x.index_select(2, self.rows).repeat(1, 1, 1, 2))
        gathered = self.second(torch.gather(x, 3, self.rows[None, None, None].expand(x.shape[0], 8, 7, -1)))
        return chosen, gathered, self.second(torch.where(x > 0.1, x, self.second(x)))


def models():
    torch.manual_seed(0)
    vision = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU6(),
        nn.Conv2d(8, 8, 3, groups=8, dilation=2),
        nn.Conv2d(8, 12, 1, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )
    return {
        "vision": (vision, [torch.randn(2, 3, 17, 17) for _ in range(3)]),
        "sequence": (
            nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, 4, bias=False)),
            [torch.randn(2, 5, 9) for _ in range(3)],
        ),
        "between": (Between(), [torch.randn(2, 3, 9, 9) for _ in range(3)]),
        "moves": (Moves(), [torch.randn(2, 3, 9, 9) for _ in range(3)]),
        "one axis": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU()), [torch.randn(2, 3, 11) for _ in range(3)]),
    }


BETWEEN = ("Mul", "Concat", "LeakyRelu", "Sigmoid", "Softmax", "AveragePool", "GlobalAveragePool")


@pytest.mark.parametrize("guard", [True, False], ids=["guarded", "unguarded"])
@pytest.mark.parametrize("shapes", ["batch", None])
@pytest.mark.parametrize("name", models())
def test_a_qoperator_file_gives_the_references_integers(name, shapes, guard, tmp_path):
    model, data = models()[name]
    place = graphq.get_target("onnxruntime", form="qoperator", guard=guard)
    quantized = graphq.quantize(model.eval(), "int8", data, target=place, dynamic_shapes=shapes, progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    result = graphq.verify(quantized, path, data)
    assert result.agrees and result.largest <= 1 and result.share_equal > 0.995
    assert not graphq.explain(quantized, path).disagreements
    kinds = {n.op_type for n in onnx.load(path).graph.node}
    if name == "between":
        assert {f"QLinear{k}" for k in BETWEEN} <= kinds
    if name == "moves":
        assert "QLinearWhere" in kinds
    assert kinds & {"QLinearConv", "QGemm", "MatMulIntegerToFloat"} and not kinds & {"Conv", "Gemm", "MatMul"}


def test_a_trained_model_gives_the_references_integers(tmp_path):
    """benchmarks/kernels.py does the same with four more."""
    data = list(zoo.photo_crops(4, 0).split(2))
    place = graphq.get_target("onnxruntime", form="qoperator", guard=False)
    quantized = graphq.quantize(zoo.efficientnet_lite0(), "int8", data, target=place, progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    result = graphq.verify(quantized, path, data[:1])
    assert result.agrees and result.share_equal == 1 and result.output_sqnr == float("inf")
    assert not graphq.explain(quantized, path).disagreements


def test_the_guard_leaves_nothing_to_saturate():
    place = graphq.get_target("onnxruntime", cpu="avx2")
    model, data = models()["vision"]
    quantized = graphq.quantize(model.eval(), "int8", data, target=place, progress=False)
    saturating = place.reference(quantized)
    exact = graphq.get_target("onnxruntime", cpu="vnni").reference(quantized)
    assert any(n.kwargs.get("saturating") for n in saturating.graph.nodes)
    assert torch.equal(saturating(data[0]), exact(data[0]))


def heavy_layer():
    """A product whose pairs leave int16: all inputs and weights are large."""
    model = nn.Linear(32, 8)
    with torch.no_grad():
        model.weight.copy_(torch.rand(8, 32) * 0.1 + 0.9)
        model.bias.zero_()
    return nn.Sequential(model, nn.ReLU(), nn.Linear(8, 2)).eval(), [torch.rand(16, 32) for _ in range(3)]


def test_verify_blames_saturation(tmp_path):
    model, data = heavy_layer()
    here, other = ("avx2", "vnni") if saturates_here() else ("vnni", "avx2")
    simulated_for = graphq.get_target("onnxruntime", cpu=other, guard=False)
    quantized = graphq.quantize(model, "int8", data, target=simulated_for, progress=False)
    result = graphq.verify(quantized, graphq.export(quantized, tmp_path / "m.onnx"), data)
    assert not result.agrees and result.first_diverging.largest > 1
    assert result.first_diverging.cause == ("int16 saturation" if here == "avx2" else "this CPU does not saturate")


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 11), rows=st.integers(1, 4), out=st.integers(1, 5))
def test_sums_of_pairs_saturate_as_the_instruction_does(seed, k, rows, out):
    rng = np.random.default_rng(seed)
    x = rng.choice([0, 1, 128, 254, 255], (rows, k))
    w = rng.choice([-128, -127, -1, 0, 3, 100, 127], (out, k))
    expected = np.zeros((rows, out), np.int64)
    for i in range(rows):
        for o in range(out):
            for p in range(0, k, 2):
                pair = sum(int(x[i, j]) * int(w[o, j]) for j in range(p, min(p + 2, k)))
                expected[i, o] += max(-(2**15), min(2**15 - 1, pair))
    xt, wt = torch.from_numpy(x).float(), torch.from_numpy(w).float()
    assert np.array_equal((xt.double() @ wt.double().T + lost_to_int16(xt, wt)).numpy(), expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_saturates_along_positions_then_channels(groups):
    torch.manual_seed(0)
    x = torch.randint(200, 256, (2, 4, 6, 5), dtype=torch.uint8)
    w = torch.randint(90, 128, (4, 4 // groups, 3, 2), dtype=torch.int8)
    one, none = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    shape = ([2, 1], [1, 0], [1, 2], groups, [], True)
    operands = (x, one, none, w, one, none, None, torch.tensor(20000.0), none, "uint8")
    ours = QCONV(*operands, *shape)
    for position in [(0, 0), (1, 2), (2, 1)]:
        for o in range(4):
            group = o // (4 // groups)
            padded = torch.nn.functional.pad(x, [0, 0, 1, 1])
            top, left = 2 * position[0], position[1]
            patch = padded[:1, :, top : top + 3, left : left + 3 : 2].chunk(groups, 1)[group]
            row, col = along_k(patch.float()), along_k(w[o : o + 1].float())
            total = (row @ col.T).double() + lost_to_int16(row, col)
            assert ours[0, o, *position] == torch.round((total / 20000).float()).clamp(0, 255).item()


def test_a_bias_that_leaves_int32_is_blamed():
    from graphq.evaluate.blame import cause

    graph = torch.fx.Graph()
    node = graph.call_function(QGEMM, ())
    x, w = torch.full((1, 4), 255, dtype=torch.uint8), torch.full((2, 4), 127, dtype=torch.int8)
    one, none = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    bias = torch.tensor([2**31 - 5, 0], dtype=torch.int32)
    args = (x, one, none, w, one, none, bias, torch.tensor(1e8), none, "uint8")
    ours = QGEMM(*args)
    runtime = torch.tensor([[0, int(ours[0, 1])]], dtype=torch.uint8)
    assert cause(node, args, {}, runtime, (ours.int() - runtime.int()).abs()) == "bias overflow"


def test_this_machines_matmul_is_one_of_the_two_models():
    rng = np.random.default_rng(0)
    w = rng.integers(-127, 128, (37, 5), dtype=np.int8)
    x = rng.integers(0, 256, (9, 37), dtype=np.uint8)
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, [None, 37])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})[0]
    exact = x.astype(np.int64) @ w.astype(np.int64)
    lost = lost_to_int16(torch.from_numpy(x).float(), torch.from_numpy(w.T.copy()).float()).numpy()
    assert np.any(lost) and np.array_equal(found, exact + lost if saturates_here() else exact)
