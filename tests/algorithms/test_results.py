"""What an algorithm says of its errors is what the products say; results outlive the graph."""

import json

import pytest
import torch
from test_gptq import GROUPS, Decoder, config, correlated
from torch import nn

import graphq
from graphq import QuantSpec, compare_algorithms, weight_results
from graphq.algorithms.results import WeightResult
from graphq.calibration.stream import Stream
from graphq.errors import ConfigError

RELATIVE = ("relative_output_squared_error", "relative_weight_squared_error")


def calibrated(model, config, data):
    prepared = graphq.prepare(model.eval(), config, (data[0],), target="simulation")
    return graphq.calibrate(prepared, data, progress=False)


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_the_six_errors_are_those_of_a_direct_computation_in_float64(algorithm):
    data = correlated()
    model = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 16))
    spec = GROUPS.model_copy(update={"group_size": 8})
    graph = calibrated(model, config(algorithm, spec=spec), data)
    weights = {n: p.detach().double() for n, p in graphq.apply_weights(graph, model).named_parameters()}
    x = torch.cat([d.reshape(-1, 32) for d in data]).double()
    for layer, result in zip((0, 2), weight_results(graph), strict=True):
        w, rounded = model[layer].weight.detach().double(), weights[f"{layer}.weight"]
        output, lost = (x @ w.T).square().sum(), (x @ (w - rounded).T).square().sum()
        direct = {
            "output_squared_error": lost,
            "mean_output_squared_error": lost / (len(x) * len(w)),
            "relative_output_squared_error": lost / output,
            "weight_squared_error": (w - rounded).square().sum(),
            "mean_weight_squared_error": (w - rounded).square().mean(),
            "relative_weight_squared_error": (w - rounded).square().sum() / w.square().sum(),
        }
        for name, value in direct.items():
            assert getattr(result, name) == pytest.approx(value.item(), rel=1e-4), name
        assert result.seconds > 0 and result.layer == str(layer)
        x = torch.relu(x @ rounded.T + model[layer].bias.detach().double())


def test_the_errors_of_convolutions_are_those_of_a_direct_computation_in_float64():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    data = [torch.randn(2, 4, 9, 11) for _ in range(3)]
    spec = QuantSpec(format="int4", granularity="channel")
    graph = calibrated(nn.Sequential(conv), config("gptq", spec=spec, select="conv"), data)
    [result], w = weight_results(graph), conv.weight.detach().double()
    rounded = next(iter(graphq.apply_weights(graph, nn.Sequential(conv)).parameters())).detach().double()
    output, lost = (
        nn.functional.conv2d(torch.cat(data).double(), v, stride=2, padding=1, groups=2).square()
        for v in (w, w - rounded)
    )
    assert result.output_squared_error == pytest.approx(lost.sum().item(), rel=1e-5)
    assert result.mean_output_squared_error == pytest.approx(lost.mean().item(), rel=1e-5)
    assert result.relative_output_squared_error == pytest.approx((lost.sum() / output.sum()).item(), rel=1e-5)
    assert result.mean_weight_squared_error == pytest.approx((w - rounded).square().mean().item(), rel=1e-6)


def test_nothing_is_relative_to_zero():
    data = [torch.zeros(2, 5, 32) for _ in range(2)]
    [result] = weight_results(calibrated(nn.Sequential(nn.Linear(32, 8)), config("gptq"), data))
    assert result.relative_output_squared_error is None and result.relative_weight_squared_error is not None
    assert "zero on all data" in result.words()


def test_results_say_which_groups_and_those_of_before_are_understood():
    fields = {"node": "n", "layer": "l", "algorithm": "gptq", "seconds": 1.0, "output_squared_error": 1.0,
              "mean_output_squared_error": 1.0, "relative_output_squared_error": 0.5, "weight_squared_error": 1.0,
              "mean_weight_squared_error": 1.0, "relative_weight_squared_error": 0.5, "nearest": 0.7}  # fmt: skip
    assert WeightResult(**fields, taken_back=True).taken_back == (0,)
    assert WeightResult(**fields, taken_back=False).taken_back == ()
    some = WeightResult(**fields, groups=4, taken_back=[0], unseen=[2])
    assert "groups 0 of 4" in some.words() and "experts 2 saw no token" in some.words()
    assert "groups" not in WeightResult(**fields, groups=2, taken_back=[0, 1]).words()
    assert WeightResult(**json.loads(json.dumps(some.to_dict()))) == some


def test_results_are_saved_with_the_graph_and_come_back_equal(tmp_path):
    model, data = Decoder(1), correlated()
    graph = calibrated(model, config("gptq"), data)
    graphq.save(graph, tmp_path / "graph")
    again = graphq.load(tmp_path / "graph", model)
    assert weight_results(again) == weight_results(graph) and len(weight_results(graph)) == 7
    one, two = (graphq.apply_weights(g, model) for g in (graph, again))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(one(data[0]), two(data[0]))
    assert torch.allclose(one(data[0]), graph(data[0]), atol=1e-5)
    assert len(weight_results(graphq.convert(again))) == 7


def test_algorithms_are_compared_on_one_run_of_the_data(monkeypatch):
    model, data, ops = Decoder(1).eval(), correlated(), []
    step = Stream._step
    monkeypatch.setattr(Stream, "_step", lambda self, node, values: ops.append(node.name) or step(self, node, values))
    prepared = graphq.prepare(model, config(), (data[0],))
    before = prepared.code
    asked = ["rtn", "gptq", {"name": "gptq", "args": {"order": "none"}}]
    results = compare_algorithms(prepared, data, asked, progress=False)
    assert max(ops.count(name) for name in set(ops)) == len(data)
    assert [r.algorithm for r in results[:3]] == ["rtn", "gptq", "gptq(order=none)"] and len(results) == 21
    by_name = {r.algorithm: sum(s.output_squared_error for s in results if s.algorithm == r.algorithm) for r in results}
    assert by_name["gptq"] < by_name["rtn"] and by_name["gptq(order=none)"] < by_name["rtn"]
    assert prepared.code == before and not weight_results(prepared)


def test_what_is_compared_chooses_one_weight_at_a_time():
    data = correlated()
    prepared = graphq.prepare(Decoder(1).eval(), config(), (data[0],))
    with pytest.raises(ConfigError, match="awq"):
        compare_algorithms(prepared, data, ["awq"], progress=False)
    with pytest.raises(ConfigError, match="layers before have lost"):
        compare_algorithms(prepared, data, ["gptaq"], progress=False)
    for args in ({"qep": 0.5}, {"qep_exclude": ["*.q"]}, {"propagate_error": False}):
        with pytest.raises(ConfigError, match=next(iter(args))):
            compare_algorithms(prepared, data, [{"name": "gptq", "args": args}], progress=False)
