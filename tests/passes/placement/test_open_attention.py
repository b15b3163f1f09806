"""Attention on integers: taken apart where a rule asks for it, predicted and simulated as ONNX Runtime runs it."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import TargetError
from graphq.graph.view import layers

INT8 = Scheme(
    weight=QuantSpec(format="int8", granularity="channel", narrow_range=True),
    input=QuantSpec(format="uint8", symmetric=False),
)
FLOAT = Scheme()


class Block(nn.Module):
    def __init__(self, causal=False):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(32, 96), nn.Linear(32, 32), causal

    def forward(self, x, mask=None):
        q, k, v = (t.unflatten(-1, (2, 16)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


def quantized(config, masked=False, form="qdq", causal=False):
    torch.manual_seed(1)
    mask = torch.tensor([[True] * 4 + [False], [False] * 5])[:, None, None].expand(2, 1, 5, 5).clone()
    data = [(torch.randn(2, 5, 32), mask) if masked else (torch.randn(2, 5, 32),) for _ in range(3)]
    place = graphq.get_target("onnxruntime", form=form)
    torch.manual_seed(0)
    return graphq.quantize(Block(causal).eval(), config, data, target=place, progress=False), data


def kernels(explanation):
    return [r.predicted for r in explanation.rows if r.action in ("quantize", "carry")]


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_without_a_mask_products_and_softmax_run_on_integers(form, tmp_path):
    graph, data = quantized("int8_attention", form=form)
    path = graphq.export(graph, tmp_path / "m.onnx")
    explanation = graphq.explain(graph, path)
    assert all(r.agrees for r in explanation.rows)
    assert kernels(explanation).count("QLinearMatMul") == 2 and "QLinearSoftmax" in kernels(explanation)
    found = graphq.verify(graph, path, data)
    assert found.agrees and found.largest <= 1


def test_with_a_mask_the_softmax_is_float_and_rows_that_see_nothing_stay_zero(tmp_path):
    graph, data = quantized("int8_attention", masked=True)
    path = graphq.export(graph, tmp_path / "m.onnx")
    explanation = graphq.explain(graph, path)
    assert all(r.agrees for r in explanation.rows)
    assert kernels(explanation).count("MatMulIntegerToFloat") == 4 and "QLinearSoftmax" not in kernels(explanation)
    run = onnxruntime.InferenceSession(path)
    x = dict(zip([i.name for i in run.get_inputs()], [t.numpy() for t in data[0]], strict=True))
    result = run.run(None, x)[0]
    assert np.abs(result[1] - result[1, :1]).max() == 0  # the bias of `out`, at every position
    assert np.abs(result - graph(*data[0]).detach().numpy()).max() < 0.02


def test_int8_leaves_attention_whole_and_says_how_to_opt_in():
    graph, _ = quantized("int8")
    [view] = [v for v in layers(graph) if v.family == "attention"]
    assert "rule on 'attention'" in view.node.meta["graphq"].reason


def test_a_rule_on_attention_holds_for_its_parts_and_one_on_matmul_does_not():
    rules = (
        Rule(select="*", scheme=INT8),
        Rule(select="attention", scheme=FLOAT),
        Rule(select="matmul", scheme=INT8, optional=True),
    )
    graph, _ = quantized(QuantConfig(rules=rules))
    assert len([v for v in layers(graph) if v.op.startswith("aten.scaled_dot")]) == 1
    rules = (Rule(select="attention", scheme=INT8), Rule(select="matmul", scheme=FLOAT, optional=True))
    graph, _ = quantized(QuantConfig(rules=rules))
    parts = [v for v in layers(graph) if v.family == "attention"]
    assert [v.op for v in parts] == [
        "aten.mul.Tensor", "aten.transpose.int", "aten.matmul.default", "aten.softmax.int", "aten.matmul.default"
    ]  # fmt: skip
    assert [v.node.meta["graphq"].action for v in parts][2:] == ["quantize"] * 3


def test_a_saved_graph_is_taken_apart_again(tmp_path):
    graph, data = quantized("int8_attention")
    torch.manual_seed(0)
    again = graphq.load(graphq.save(graph, tmp_path / "g"), Block().eval())
    assert torch.equal(again(*data[0]), graph(*data[0]))


def test_targets_that_see_attention_otherwise_are_not_calibrated_together():
    with pytest.raises(TargetError, match="attention in parts"):
        graphq.prepare(Block().eval(), "int8_attention", (torch.randn(2, 5, 32),), target=["tensorrt", "onnxruntime"])


def test_attention_that_a_flag_makes_causal_stays_whole():
    graph, _ = quantized("int8_attention", causal=True)
    [view] = [v for v in layers(graph) if v.family == "attention"]
    assert view.node.meta["graphq"].action == "float"


def test_the_error_of_attention_on_integers_is_that_of_int8():
    graph, data = quantized("int8_attention")
    torch.manual_seed(0)
    want = Block().eval()
    with torch.no_grad():
        y, z = want(*data[0]), graph(*data[0])
    assert 10 * torch.log10(y.square().sum() / (y - z).square().sum()) > 25
