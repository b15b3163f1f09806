"""What is computed on an accelerator is computed there, and is what the CPU computes."""

import copy

import pytest
import torch
from torch import nn

import graphq
from causal_lm import Logits
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.config.presets import CONFIGS, KNOWN_CONFIGS
from graphq.numerics.affine import dequantize, fake_quantize, quantize, sqnr
from graphq.numerics.formats import FORMATS, SharedExponents

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
INT4 = QuantSpec(format="int4", granularity="group", group_size=16, observer="mse_grid")
INT8 = QuantSpec(format="uint8", symmetric=False)
PRESETS = [*sorted(set(CONFIGS) - set(KNOWN_CONFIGS)), "NVFP4_DEFAULT_CFG", "MXFP8_DEFAULT_CFG", "FP8_DEFAULT_CFG"]
QEP = {"name": "gptq", "args": {"qep": 0.5}}
LEARNED = {"name": "autoround", "args": {"iterations": 5}}
ALGORITHMS = ["rtn", "gptq", QEP, "gptaq", "fpi_gptq", "adaround", LEARNED, "awq", "smoothquant"]
TOKENS = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.hardswish(self.point(torch.clamp(self.deep(x), 0, 6) + x))
        return self.head(x.mean((2, 3)))


def images():
    return [torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return Logits(transformers.LlamaForCausalLM(config).eval())


def tokens():
    return [torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(i)) for i in range(6)]


def devices_of(gm):
    return {t.device.type for t in [*gm.parameters(), *gm.buffers()]}


def quantized(model, config, batches, device, free=None, target="simulation"):
    """The converted graph, from a model and an example on the device and batches that are on the CPU."""
    torch.manual_seed(0)
    shapes = (free,) if free else None
    prepared = graphq.prepare(
        copy.deepcopy(model).to(device), config, (batches[0].to(device),), target=target, dynamic_shapes=shapes
    )
    with torch.no_grad():
        graph = graphq.convert(graphq.calibrate(prepared, batches, progress=False))
    assert devices_of(graph) == {device}
    return graph


@torch.no_grad()
def both(model, config, batches, free=None, **options):
    """Outputs of the graph that the CPU made, and of that of the device, each on its own."""
    results = []
    for device in ("cpu", "cuda"):
        graph = quantized(model, config, batches, device, free, **options)
        result = graph(batches[-1].to(device))
        assert result.device.type == device
        results.append(result.cpu())
    return results


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_on_a_device_what_they_give_on_the_cpu(name):
    model, batches, free = llama(), tokens(), TOKENS
    wanted, given = both(model, name, batches, free)
    assert sqnr(wanted, given) > 20


@pytest.mark.parametrize("target", ["simulation", "onnxruntime", "tensorrt"])
def test_a_convolutional_model_is_calibrated_on_its_device(target):
    wanted, given = both(Net().eval(), "int8", images(), target=target)
    assert sqnr(wanted, given) > 25


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=str)
def test_weights_are_chosen_on_the_device(algorithm):
    given = INT8 if algorithm == "smoothquant" else None
    config = QuantConfig(
        rules=(Rule(select="linear", scheme=Scheme(weight=INT4, input=given)),), algorithms=(algorithm,)
    )
    wanted, found = both(llama(), config, tokens(), TOKENS)
    assert sqnr(wanted, found) > 15


@pytest.mark.parametrize("name", sorted(n for n, f in FORMATS.items() if not isinstance(f, SharedExponents)))
def test_codes_are_those_of_the_cpu_bit_for_bit(name):
    fmt = FORMATS[name]
    x = torch.cat([torch.randn(4, 4096) * 2.0**i for i in range(-4, 8)], 1)
    scale, zero = torch.rand(4, 1) + 0.01, torch.zeros(4, 1, dtype=torch.int32)
    codes = quantize(x, scale, zero, (1, -1), fmt)
    there = quantize(x.cuda(), scale.cuda(), zero.cuda(), (1, -1), fmt)
    assert torch.equal(codes, there.cpu())
    back = dequantize(there, scale.cuda(), zero.cuda(), (1, -1), fmt).cpu()
    assert torch.equal(dequantize(codes, scale, zero, (1, -1), fmt), back)
    assert torch.equal(fake_quantize(x.cuda(), scale.cuda(), zero.cuda(), (1, -1), fmt).cpu(), back)


def test_training_stays_on_the_device():
    model = Net().eval().cuda()
    prepared = graphq.prepare(model, "int8", (images()[0].cuda(),), target="simulation")
    training = graphq.qat(graphq.calibrate(prepared, images(), progress=False))
    optimizer = torch.optim.SGD(training.parameters(), lr=1e-3)
    for x in images():
        training(x.cuda()).square().mean().backward()
        optimizer.step()
    assert devices_of(graphq.convert(training)) == {"cuda"}


def test_a_graph_of_a_device_is_exported_and_verified(tmp_path):
    graph = quantized(Net().eval(), "int8", images(), "cuda", target="onnxruntime")
    path = graphq.export(graph, tmp_path / "net.onnx")
    assert graphq.verify(graph, path, images()[-1:]).agrees


@pytest.mark.parametrize("absorb", [False, True])
def test_two_layers_are_equalized_on_the_device(absorb):
    spec = Scheme(weight=QuantSpec(format="int8", granularity="tensor"), input=INT8)
    config = QuantConfig(
        rules=(Rule(select="conv | linear", scheme=spec),),
        algorithms=({"name": "equalization", "args": {"absorb": absorb}},),
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model[0].bias.data[:2] = 10
    wanted, found = both(model.eval(), config, images())
    assert sqnr(wanted, found) > 25


def test_weights_on_disk_are_read_to_the_device(tmp_path):
    model, x = llama(), tokens()[-1]
    model.model.save_pretrained(tmp_path / "model")
    config = QuantConfig(rules=(Rule(select="linear", scheme=Scheme(weight=INT4)),), algorithms=("gptq",))
    build = lambda: transformers.LlamaForCausalLM(model.model.config)  # noqa: E731
    results = []
    for device in ("cpu", "cuda"):
        loaded = Logits(graphq.from_disk(build, tmp_path / "model", device))
        prepared = graphq.prepare(loaded, config, (x.to(device),), target="simulation", dynamic_shapes=(TOKENS,))
        graphq.calibrate(prepared, tokens(), progress=False, store=tmp_path / device, frontier="disk")
        with torch.no_grad():
            results.append(graphq.apply_stored(tmp_path / device, llama())(x))
    assert sqnr(*results) > 15


def test_a_saved_graph_is_loaded_onto_a_device(tmp_path):
    model, x = Net().eval().cuda(), images()[0].cuda()
    prepared = graphq.calibrate(graphq.prepare(model, "int8", (x,), target="simulation"), images(), progress=False)
    graphq.save(prepared, tmp_path / "net")
    again = graphq.load(tmp_path / "net", model)
    with torch.no_grad():
        assert torch.equal(graphq.convert(again)(x), graphq.convert(prepared)(x))


def test_chosen_weights_go_back_into_the_eager_model_of_the_device():
    model, x = llama().cuda(), tokens()[-1].cuda()
    config = QuantConfig(rules=(Rule(select="linear", scheme=Scheme(weight=INT4)),), algorithms=("gptq",))
    prepared = graphq.prepare(model, config, (x,), target="simulation", dynamic_shapes=(TOKENS,))
    calibrated = graphq.calibrate(prepared, tokens(), progress=False)
    with torch.no_grad():
        eager = graphq.apply_weights(calibrated, model)(x)
        assert sqnr(graphq.convert(calibrated)(x), eager) > 80
