"""Registered modules: the LayerNorm of ModelOpt's guide, with graphq's names."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import CalibrationError, ConfigError
from graphq.nn import TensorQuantizer
from graphq.numerics.affine import fake_quantize
from graphq.quantizer import quantizers


class QuantLayerNorm(nn.LayerNorm):
    def __init__(self, normalized_shape):
        super().__init__(normalized_shape)
        self._setup()

    def _setup(self):
        # Method to setup the quantizers
        self.input_quantizer = TensorQuantizer()
        self.weight_quantizer = TensorQuantizer()

    def forward(self, input):
        # You can customize the quantizer placement anywhere in the forward method
        input = self.input_quantizer(input)
        weight = self.weight_quantizer(self.weight)
        return F.layer_norm(input, self.normalized_shape, weight, self.bias, self.eps)


@pytest.fixture
def registered():
    graphq.register(original_cls=nn.LayerNorm, quantized_cls=QuantLayerNorm)
    yield
    graphq.unregister(nn.LayerNorm)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


SCHEME = Scheme(weight=QuantSpec(narrow_range=True), input=QuantSpec(format="uint8", symmetric=False))
CONFIG = QuantConfig(rules=(Rule(select="linear", scheme=SCHEME), Rule(select="LayerNorm", scheme=SCHEME)))


def test_the_layer_norm_of_the_guide_is_quantized_where_its_forward_says(registered):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(32, 16)

    def forward_loop(model):
        model(x)

    # nn.LayerNorm modules in the model are traced as QuantLayerNorm
    prepared = graphq.prepare(model, CONFIG, (x,))
    graphq.calibrate(prepared, forward_loop, progress=False)
    found = quantizers(prepared)
    (weight,) = [q for q in found.values() if q.label == "norm.weight"]
    assert weight.constant and weight.spec == SCHEME.weight
    (norm,) = [n for n in prepared.graph.nodes if n.op == "call_function" and "layer_norm" in str(n.target)]
    assert [a.op for a in norm.all_input_nodes] == ["call_module", "call_module", "get_attr"]
    assert type(model.norm) is nn.LayerNorm
    whole = graphq.quantize(model, CONFIG, forward_loop, progress=False)
    assert torch.equal(whole(x), graphq.convert(prepared)(x))
    wanted = fake_quantize(
        model.norm.weight.detach(), *weight.qparams, (), weight.spec.number_format, narrow_range=True
    )
    assert torch.equal(prepared.get_submodule(str(norm.args[2].target))(model.norm.weight.detach()), wanted)


def test_its_export_runs_as_simulated(registered, tmp_path):
    model, x = Net().eval(), torch.randn(32, 16)
    converted = graphq.quantize(model, CONFIG, [x], progress=False)
    path = graphq.export(converted, tmp_path / "net.onnx")
    assert graphq.verify(converted, path, [x]).agrees


def test_it_trains(registered):
    model, x = Net().eval(), torch.randn(32, 16)
    calibrated = graphq.calibrate(graphq.prepare(model, CONFIG, (x,), target="simulation"), [x], progress=False)
    trained = graphq.qat(calibrated)
    trained(x).square().mean().backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_places_that_the_scheme_says_nothing_of_stay_float(registered):
    model, x = Net().eval(), torch.randn(32, 16)
    config = QuantConfig(rules=(Rule(select="LayerNorm", scheme=Scheme(input=SCHEME.input)),))
    prepared = graphq.prepare(model, config, (x,))
    assert len(quantizers(prepared)) == 1
    plain = graphq.prepare(model, QuantConfig(rules=(Rule(select="linear", scheme=None),)), (x,))
    assert torch.equal(plain(x), model(x)) and not quantizers(plain)


def test_a_class_that_does_not_keep_the_contract_is_refused():
    with pytest.raises(ConfigError, match="_setup"):
        graphq.register(nn.LayerNorm, nn.LayerNorm)

    class Foreign(nn.Module):
        def _setup(self): ...

    with pytest.raises(ConfigError, match="derived"):
        graphq.register(nn.LayerNorm, Foreign)
    with pytest.raises(ConfigError, match="not registered"):
        graphq.unregister(nn.Linear)


def test_a_loop_that_never_calls_the_model_is_an_error():
    with pytest.raises(CalibrationError, match="does not call"):
        graphq.quantize(Net(), CONFIG, lambda model: None)
