"""LSTMs whose scales are found at run time: opened without change, and what ONNX Runtime's kernel computes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphq
from graphq import QuantConfig, Rule
from graphq.errors import StateError
from graphq.graph.recurrent_ops import LSTM, OF_ONNX, TO_ONNX, reorder
from graphq.passes.placement import open_lstm
from graphq.passes.targets import get_target

DYNAMIC = QuantConfig.load("int8_dynamic")


class Tagger(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.lstm = nn.LSTM(12, 20, **how)
        self.head = nn.Linear(self.lstm.proj_size or 20 * (1 + self.lstm.bidirectional), 3)
        with torch.no_grad():
            for parameter in self.lstm.parameters():
                parameter.mul_(3)

    def forward(self, x, h, c):
        y, (last_h, last_c) = self.lstm(x, (h, c))
        return self.head(y), last_h, last_c


def tagger(layers=1, bidirectional=False, batch=1, **how):
    torch.manual_seed(0)
    model = Tagger(num_layers=layers, bidirectional=bidirectional, **how).eval()
    x = torch.randn(batch, 7, 12) if how.get("batch_first") else torch.randn(7, batch, 12)
    states = [torch.randn(layers * (1 + bidirectional), batch, 20) for _ in range(2)]
    return model, (x, *states)


@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 3), bidirectional=st.booleans(), batch=st.integers(1, 3), batch_first=st.booleans(),
    bias=st.booleans(),
)  # fmt: skip
def test_opening_keeps_the_function(layers, bidirectional, batch, batch_first, bias):
    model, args = tagger(layers, bidirectional, batch, batch_first=batch_first, bias=bias)
    graph = graphq.capture(model, args, dynamic_shapes=None)
    assert open_lstm(graph, DYNAMIC, get_target("onnxruntime")) == 1
    assert len(graph.graph.find_nodes(op="call_function", target=LSTM)) == layers * (1 + bidirectional)
    for ours, expected in zip(graph(*args), model(*args), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}])
def test_the_kernel_computes_what_is_simulated(how, tmp_path):
    model, args = tagger(**how)
    graph = graphq.quantize(model, DYNAMIC, [args], dynamic_shapes=None, progress=False)
    path = graphq.export(graph, tmp_path / "m.onnx")
    explanation = graphq.explain(graph, path)
    assert explanation.disagreements == []
    assert explanation.kernels()["DynamicQuantizeLSTM"] == (4 if "layers" in how else 1)
    assert graphq.verify(graph, path, [args]).output_sqnr > 100
    signal, noise = model(*args)[0], graph(*args)[0] - model(*args)[0]
    assert 30 < 10 * torch.log10(signal.pow(2).sum() / noise.pow(2).sum()) < 60  # it is quantized, and well


def test_rows_of_a_batch_share_the_scales_of_every_step(tmp_path):
    model, args = tagger(batch=6)
    graph = graphq.quantize(model, DYNAMIC, [args], dynamic_shapes=None, progress=False)
    assert graphq.verify(graph, graphq.export(graph, tmp_path / "m.onnx"), [args]).output_sqnr > 60
    alone = torch.cat([graph(args[0][:, i : i + 1].expand(-1, 6, -1), *args[1:])[0][:, i : i + 1] for i in range(6)], 1)
    assert not torch.equal(alone, graph(*args)[0])


def test_a_prepared_graph_still_computes_the_float_model():
    model, args = tagger()
    prepared = graphq.prepare(model, DYNAMIC, args, dynamic_shapes=None)
    torch.testing.assert_close(prepared(*args)[0], model(*args)[0], atol=1e-5, rtol=1e-5)
    before = prepared(*args)[0]
    graphq.calibrate(prepared, [args], progress=False)
    assert not torch.equal(prepared(*args)[0], before)


def test_a_saved_graph_comes_back_with_its_rounded_states(tmp_path):
    model, args = tagger()
    calibrated = graphq.calibrate(graphq.prepare(model, DYNAMIC, args, dynamic_shapes=None), [args], progress=False)
    for graph, folder in ((calibrated, tmp_path / "a"), (graphq.convert(calibrated), tmp_path / "b")):
        again = graphq.load(graphq.save(graph, folder), model)
        assert all(torch.equal(a, b) for a, b in zip(again(*args), graph(*args), strict=True))


def test_training_one_is_refused():
    model, args = tagger()
    calibrated = graphq.calibrate(graphq.prepare(model, DYNAMIC, args, dynamic_shapes=None), [args], progress=False)
    with pytest.raises(StateError, match="has no gradient") as told:
        graphq.qat(calibrated)
    assert "lstm" in str(told.value)


def test_what_has_no_kernel_says_why():
    gru = nn.GRU(4, 6).eval()
    reasons = {
        "takes neither projections": (*tagger(proj_size=0), "int8"),
        "no integer kernel for GRU": (gru, (torch.randn(5, 1, 4), torch.zeros(1, 1, 6)), "int8_dynamic"),
    }
    for words, (model, args, config) in reasons.items():
        config = config if config == "int8" else QuantConfig(rules=(*DYNAMIC.rules,))
        rows = graphq.explain(graphq.prepare(model, config, args, dynamic_shapes=None)).rows
        assert any(r.action == "float" and words in r.reason for r in rows)


def test_projections_and_excluded_lstms_stay_whole():
    target = get_target("onnxruntime")
    model, (x, h, c) = tagger(proj_size=5)
    assert open_lstm(graphq.capture(model, (x, h[..., :5], c), dynamic_shapes=None), DYNAMIC, target) == 0
    model, args = tagger()
    spared = DYNAMIC.with_rules(Rule(select="lstm", scheme=None, reason="kept"))
    assert open_lstm(graphq.capture(model, args, dynamic_shapes=None), spared, target) == 0


def test_the_order_of_gates_is_undone():
    rows = torch.arange(8.0)[:, None]
    assert reorder(rows, TO_ONNX).flatten().tolist() == [0, 1, 6, 7, 2, 3, 4, 5]  # input, output, forget, cell
    assert torch.equal(reorder(reorder(rows, TO_ONNX), OF_ONNX), rows)
