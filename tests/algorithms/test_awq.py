"""AWQ finds scales that make rounded products better, and keeps the float function wherever the scales go."""

import pytest
import torch
from test_gptq import Decoder
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms.awq import _searched
from graphq.algorithms.samples import RowSamples
from graphq.algorithms.scaling import SMOOTHED, groups
from graphq.errors import ConfigError
from graphq.quantizer import quantizers

INT4 = QuantSpec(format="int4", granularity="group", group_size=16)


def config(*algorithms, select="linear"):
    return QuantConfig(name="weights", rules=(Rule(select=select, scheme=Scheme(weight=INT4)),), algorithms=algorithms)


def data(count=6, width=32):
    """Two channels carry most."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(width).index_fill(0, torch.tensor([3, 17]), 12.0)
    return [torch.randn(2, 20, width, generator=generator) * scale for _ in range(count)]


@pytest.mark.parametrize("duo", [True, False])
def test_channels_that_carry_much_cost_less(duo):
    model, calibration, held = Decoder(1).eval(), data(), data(8)[6:]
    plain, scaled = (
        graphq.quantize(model, config(*a), calibration, progress=False)
        for a in ((), ({"name": "awq", "args": {"duo": duo}},))
    )
    quality = [graphq.compare(model, graph, held, per_op=False).sqnr for graph in (plain, scaled)]
    assert quality[1] > quality[0] + (1 if duo else 0.2), quality


def test_scales_go_into_norms_and_the_other_side_of_a_product_and_the_function_is_kept():
    model = Decoder().eval()
    graph = graphq.calibrate(graphq.prepare(model, config("awq"), (data()[0],)), data(), progress=False)
    found = dict(graph.meta[SMOOTHED])
    assert all(found[n] for n in found if n.startswith(("rms_norm", "mul")))
    assert sum(n.startswith("rms_norm") for n in found) == 4 and sum(n.startswith("mul") for n in found) == 2
    assert [fold for name, fold in found.items() if not name.startswith(("rms_norm", "mul"))] == [True, True]  # v → o
    for quantizer in quantizers(graph).values():
        quantizer.state = "off"
    for x in data(8)[6:]:
        assert torch.allclose(graph(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read", [True, False], ids=["by others", "squared"])
def test_a_norm_that_others_read_keeps_its_weight_and_a_product_stands_in_between(read):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x):
            y = self.norm(x * torch.linspace(0.1, 9, 32))
            return self.layer(y * y) + (y if read else 0)

    model = Shared().eval()
    graph = graphq.calibrate(graphq.prepare(model, config("awq"), (data()[0],)), data(), progress=False)
    assert [fold for _, fold in graph.meta[SMOOTHED]] == [False]
    for quantizer in quantizers(graph).values():
        quantizer.state = "off"
    assert torch.allclose(graph(data()[0]), model(data()[0]), rtol=1e-5, atol=1e-4)


def test_it_is_followed_by_gptq_and_all_is_saved(tmp_path):
    model, calibration, held = Decoder(1).eval(), data(), data(8)[6:]
    graphs = [graphq.quantize(model, config(*a), calibration, progress=False) for a in (["awq"], ["awq", "gptq"])]
    one, both = (graphq.compare(model, g, held, per_op=False).sqnr for g in graphs)
    assert both > one
    loaded = graphq.load(graphq.save(graphs[1], tmp_path / "saved"), model)
    assert torch.equal(loaded(held[0]), graphs[1](held[0]))
    path = graphq.export(graphs[1], tmp_path / "m.onnx")
    assert graphq.verify(graphs[1], path, held[:1]).agrees


def test_algorithms_that_have_run_do_not_run_again_after_a_failed_calibration(monkeypatch):
    class Fails(RuntimeError):
        pass

    def fail(self):
        raise Fails

    model = Decoder(1).eval()
    prepared, untroubled = (graphq.prepare(model, config("awq", "gptq"), (data()[0],)) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr("graphq.calibration.calibrate._Statistics.observe", fail)
        with pytest.raises(Fails):
            graphq.calibrate(prepared, data(), progress=False)
    outputs = [graphq.calibrate(g, data(), progress=False)(data()[0]) for g in (prepared, untroubled)]
    assert torch.equal(*outputs)


def test_a_channel_that_is_zero_in_all_data_keeps_its_weights():
    model, calibration = nn.Sequential(nn.Linear(32, 24)).eval(), data()
    for x in calibration:
        x[..., 5] = 0
    gm = graphq.prepare(model, config("awq"), (calibration[0],), target="simulation")
    group, seen = next(iter(groups(gm))), RowSamples(256)
    for x in calibration:
        seen(x)
    scale = _searched(gm, group, seen, 10, True)
    assert scale is not None and scale[5] == 1 and scale.max() > 1.5
    assert _searched(gm, group, zeros(seen), 10, True) is None


def zeros(seen):
    none = RowSamples(256)
    none(torch.zeros_like(seen.rows))
    return none


def test_no_layer_to_scale_and_no_grid_are_errors():
    rows = QuantSpec(format="int4", granularity="channel")
    settings = QuantConfig(rules=(Rule(select="conv", scheme=Scheme(weight=rows)),), algorithms=["awq"])
    with pytest.raises(ConfigError, match="no linear has a quantized weight"):
        graphq.quantize(nn.Conv1d(2, 32, 3).eval(), settings, [torch.randn(2, 2, 9)], progress=False)
    with pytest.raises(ConfigError, match="at least one step"):
        graphq.quantize(Decoder(1).eval(), config({"name": "awq", "args": {"grid": 0}}), data(), progress=False)
