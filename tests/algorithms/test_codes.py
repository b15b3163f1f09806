"""The codes of a graph's weights are those that its values are made of."""

import pytest
import torch
from test_gptq import GROUPS, Decoder, config, correlated
from torch import nn

import graphq
from graphq import QuantSpec, quantized_weights, weight_results
from graphq.errors import StateError


def calibrated(model, settings, data):
    graph = graphq.prepare(model.eval(), settings, (data[0],), target="simulation")
    return graphq.calibrate(graph, data, progress=False)


@pytest.mark.parametrize("algorithms", [(), ("gptq",), ("awq", "gptq")])
def test_codes_and_scales_give_the_weights_that_go_back_into_the_model(algorithms):
    model = Decoder(1)
    graph = calibrated(model, config(*algorithms), correlated())
    found = list(quantized_weights(graph))
    applied = dict(graphq.apply_weights(graph, model).named_parameters())
    assert len(found) == 7 and {w.parameter for w in found} == {
        n for n in applied if "norm" not in n and "bias" not in n
    }
    for weight in found:
        assert weight.codes.shape == applied[weight.parameter].shape and weight.codes.abs().max() <= 8
        assert weight.scale.shape == weight.zero_point.shape == (len(weight.codes), weight.codes.shape[1] // 16)
        by_hand = weight.codes.double().unflatten(1, (-1, 16)) * weight.scale.double()[..., None]
        torch.testing.assert_close(by_hand.flatten(1).float(), applied[weight.parameter])
        assert torch.equal(weight.read(), applied[weight.parameter])
        assert weight.layer == weight.parameter.removesuffix(".weight") and weight.spec.format == "int4"
    assert [w.result for w in found if w.result] == weight_results(graph)


def test_convolutions_and_zero_points_have_theirs():
    torch.manual_seed(0)
    spec = QuantSpec(format="uint4", symmetric=False, granularity="channel")
    model, data = nn.Sequential(nn.Conv2d(4, 6, 3)), [torch.randn(2, 4, 8, 8) for _ in range(2)]
    [weight] = quantized_weights(calibrated(model, config("gptq", spec=spec, select="conv"), data))
    by_hand = (weight.codes.double() - weight.zero_point.reshape(6, 1, 1, 1)) * weight.scale.reshape(6, 1, 1, 1)
    torch.testing.assert_close(by_hand.float(), weight.read())
    assert weight.codes.shape == (6, 4, 3, 3) and weight.zero_point.unique().numel() > 1


def test_going_through_them_leaves_gradients_on():
    for weight in quantized_weights(calibrated(Decoder(1), config(), correlated())):
        assert torch.is_grad_enabled() and not weight.scale.requires_grad


def test_a_table_that_two_ops_read_comes_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 32)

        def forward(self, ids):
            return self.table(ids) @ self.table.weight.T

    ids = torch.arange(12).reshape(2, 6)
    [weight] = quantized_weights(calibrated(Tied(), config(select="linear | embedding"), [ids]))
    assert weight.parameter == "table.weight" and weight.result is None


def test_an_lstm_has_two():
    torch.manual_seed(0)
    model = nn.LSTM(8, 16, batch_first=True).eval()
    graph = graphq.calibrate(graphq.prepare(model, "int8_dynamic", (torch.randn(1, 5, 8),)), [torch.randn(1, 5, 8)])
    found = {w.codes.shape[1] for w in quantized_weights(graph)}
    assert found == {8, 16}


def test_a_graph_that_is_not_calibrated_has_none():
    prepared = graphq.prepare(nn.Linear(32, 8), config(spec=GROUPS), (torch.randn(2, 32),))
    with pytest.raises(StateError, match="calibrate"):
        quantized_weights(prepared)
    with pytest.raises(StateError, match="calibrate"):
        quantized_weights(nn.Linear(32, 8))
    with pytest.raises(StateError, match="one graph"):
        quantized_weights({"onnxruntime": prepared})
