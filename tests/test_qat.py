"""Quantization-aware training: gradients are those of the papers, and what was trained is what is converted."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import ConfigError, StateError
from graphq.numerics.formats import get_format
from graphq.numerics.ste import fake_quantize_through
from graphq.passes.targets.onnxruntime import saturates_here
from graphq.qat import observers
from graphq.quantizer import quantizers

AFFINE = QuantSpec(format="uint4", symmetric=False)
INT4 = QuantSpec(format="int4", granularity="channel")


def config(weight=INT4, given=AFFINE):
    return QuantConfig(rules=(Rule(select="linear | conv", scheme=Scheme(weight=weight, input=given)),))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 16, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


def calibrated(target="simulation", **options):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(32, 2, 4, 4)
    prepared = graphq.prepare(model, config(**options), (x,), target=target)
    return model, x, graphq.calibrate(prepared, [x], progress=False)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("block", [(), (1, -1), (1, 4)])
@pytest.mark.parametrize("name", ["int4", "uint4", "fp4_e2m1"])
def test_gradients_are_those_of_lsq_summed_value_by_value(name, block, clip):
    torch.manual_seed(0)
    fmt = get_format(name)
    x = (torch.randn(3, 8) * 6).requires_grad_()
    shape = () if not block else (3, 1) if block == (1, -1) else (3, 2)
    scale = (torch.rand(shape) + 0.5).requires_grad_()
    zero = torch.full(shape, 7.0 if name == "uint4" else 0.0, requires_grad=name == "uint4")
    weight = torch.randn(3, 8)
    (fake_quantize_through(x, scale, zero, block, fmt, clip=clip) * weight).sum().backward()
    lowest, highest = fmt.limits()
    wide = np.broadcast_to(
        np.repeat(scale.detach().numpy(), 4, 1) if block == (1, 4) else scale.detach().numpy(), (3, 8)
    )
    z = zero.max().item()
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    ds, dz, dx = np.zeros((3, 8)), np.zeros((3, 8)), np.zeros((3, 8))
    for i in np.ndindex(3, 8):
        v, g = x[i].item() / wide[i], weight[i].item()
        inside = lowest - z <= v <= highest - z
        nearest = np.rint(v) if name != "fp4_e2m1" else np.sign(v) * values[np.abs(values - abs(v)).argmin()]
        ds[i] = g * (nearest - v if inside else (lowest - z if v < lowest - z else highest - z))
        dz[i] = 0 if inside else -g * wide[i]
        dx[i] = g if inside or not clip else 0

    def reduced(each):
        return (
            each.sum()
            if not block
            else each.sum(1, keepdims=True)
            if block == (1, -1)
            else each.reshape(3, 2, 4).sum(2)
        )

    count = 24 if not block else 8 if block == (1, -1) else 4
    np.testing.assert_allclose(scale.grad.numpy(), reduced(ds) / np.sqrt(count * highest), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(x.grad.numpy(), dx, rtol=1e-6)
    if zero.requires_grad:
        np.testing.assert_allclose(zero.grad.numpy(), reduced(dz), rtol=1e-4, atol=1e-5)


def test_sgd_moves_a_learned_scale_as_if_it_were_the_parameter():
    from graphq.numerics.ste import relative

    scale, growth = torch.tensor([0.02, 0.5]), torch.ones(2, requires_grad=True)
    slope = torch.tensor([3.0, -1.0])
    (relative(scale, growth) * slope).sum().backward()
    moved = scale * (growth - 0.001 * growth.grad)
    torch.testing.assert_close(moved, scale - 0.001 * slope)


def train(graph, x, wanted, steps=60, rate=3e-3):
    optimizer = torch.optim.Adam(graph.parameters(), rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (graph(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scales", ["frozen", "lsq", "lsq+", "tqt"])
def test_training_lowers_the_error_and_converts_to_what_was_trained(scales):
    model, x, graph = calibrated()
    before = copy.deepcopy(graph.state_dict())
    trained = graphq.qat(graph, scales)
    if scales == "frozen":
        assert torch.equal(trained(x), graph(x))
    with torch.no_grad():
        wanted = model(x)
    losses = train(trained, x, wanted)
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(graphq.convert(trained)(x), trained(x))
    after = graph.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if isinstance(v, torch.Tensor))
    learned = [q for q in quantizers(trained).values() if any(True for _ in q.parameters())]
    assert len(learned) == (0 if scales == "frozen" else 4)
    if scales == "tqt":
        for q in quantizers(graphq.qat(graph, "tqt")).values():
            assert torch.equal(torch.log2(q.qparams[0]), torch.log2(q.qparams[0]).round())


@pytest.mark.parametrize("cpu", ["avx2", "vnni"])
def test_a_trained_graph_exports_and_the_runtime_computes_it(tmp_path, cpu):
    int8 = QuantSpec(format="int8", granularity="channel", narrow_range=True)
    uint8 = QuantSpec(format="uint8", symmetric=False)
    if cpu == "vnni" and saturates_here():
        cpu = "avx2"  # what is made for another CPU saturates here, as it must
    model, x, graph = calibrated(graphq.get_target("onnxruntime", cpu=cpu), weight=int8, given=uint8)
    trained = graphq.qat(graph, "lsq")
    with torch.no_grad():
        wanted = model(x)
    train(trained, x, wanted, steps=10)
    converted = graphq.convert(trained)
    path = graphq.export(converted, tmp_path / "trained.onnx")
    assert graphq.verify(converted, path, [x]).agrees


def test_dynamic_and_repeated_specs_train():
    weight = QuantSpec(format="int4", granularity="channel", then=QuantSpec(format="fp8_e4m3"))
    model, x, graph = calibrated(weight=weight, given=QuantSpec(format="int8", dynamic=True))
    trained = graphq.qat(graph)
    with torch.no_grad():
        wanted = model(x)
    losses = train(trained, x, wanted)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(graphq.convert(trained)(x), trained(x))


def test_observers_follow_the_data_by_schedule():
    _, x, graph = calibrated()
    trained = graphq.qat(graph, "frozen")
    q = next(q for q in quantizers(trained).values() if not q.constant)
    first = q.scale.clone()
    observers(trained, on=True)
    for _ in range(60):
        trained(3 * x)
    followed = q.scale.clone()
    assert followed.item() == pytest.approx(3 * first.item(), rel=0.02)
    observers(trained, on=False)
    trained(100 * x)
    assert torch.equal(q.scale, followed)
    with pytest.raises(StateError, match="frozen"):
        observers(graphq.qat(graph, "lsq"), on=True)


def test_state_is_in_parameters_and_buffers_as_data_parallel_training_needs_it():
    _, x, graph = calibrated()
    trained = graphq.qat(graph)
    names = {n for n, _ in trained.named_parameters()}
    assert {n.rpartition(".")[2] for n in names if "quantizers." in n} == {"growth"}
    assert sum("quantizers." not in n for n in names) == 4  # two weights, two biases
    twin = graphq.qat(graph)
    train(trained, x, torch.zeros(32, 4), steps=3)
    assert not torch.equal(twin(x), trained(x))
    twin.load_state_dict(trained.state_dict())
    assert torch.equal(twin(x), trained(x))


def test_folded_weights_compute_the_same_and_refuse_what_needs_the_float_ones(tmp_path):
    _, x, graph = calibrated()
    folded = graphq.fold_weights(graph)
    assert torch.equal(folded(x), graph(x))
    assert len([n for n in folded.graph.nodes if n.op == "call_module"]) == 2
    for refused in (lambda: graphq.convert(folded), lambda: graphq.qat(folded)):
        with pytest.raises(StateError, match="fold"):
            refused()
    trained = graphq.qat(graph)
    assert torch.equal(graphq.fold_weights(trained)(x), trained(x))


def test_a_typo_and_a_graph_that_is_not_calibrated_are_errors():
    model, x, graph = calibrated()
    with pytest.raises(ConfigError, match="lsq"):
        graphq.qat(graph, "lsg")
    with pytest.raises(StateError, match="calibrated"):
        graphq.qat(graphq.prepare(model, config(), (x,), target="simulation"))


def test_every_parameter_gets_a_gradient_as_data_parallel_training_wants_it():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(16, 2, 4, 4)
    graph = graphq.calibrate(graphq.prepare(model, "int8", (x,)), [x], progress=False)
    trained = graphq.qat(graph)
    trained(x).square().mean().backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_a_layer_that_stays_float_trains_too():
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(16, 2, 4, 4)
    made = config().model_copy(update={"ignore": ("conv",)})
    graph = graphq.calibrate(graphq.prepare(model, made, (x,), target="simulation"), [x], progress=False)
    trained = graphq.qat(graph)
    assert sum(n.startswith("conv.") for n, _ in trained.named_parameters()) == 2  # the folded weight and bias


@pytest.mark.parametrize("format", ["mxfp4", "bfp16", "nvfp4"])
def test_scales_that_a_format_restricts_stay_on_their_grid(format):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(32, 64)
    graph = graphq.calibrate(
        graphq.prepare(model, config(QuantSpec(format=format), None), (x,), target="simulation"), [x], progress=False
    )
    trained = graphq.qat(graph)
    train(trained, x, torch.zeros(32, 32), steps=5, rate=0.05)
    (q,) = quantizers(trained).values()
    if format == "nvfp4":
        (before,) = quantizers(graph).values()
        assert torch.equal(q.qparams[0], before.scale)
    else:
        exponents = torch.log2(q.qparams[0])
        assert torch.equal(exponents, exponents.round())


def test_observers_do_not_follow_validation_data():
    _, x, graph = calibrated()
    trained = graphq.qat(graph, "frozen")
    observers(trained, on=True)
    before = [q.scale.clone() for q in quantizers(trained).values()]
    trained.eval()(100 * x)
    assert all(torch.equal(a, q.scale) for a, q in zip(before, quantizers(trained).values(), strict=True))


def test_a_folded_graph_shares_nothing_with_the_calibrated_one_and_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    x = torch.randn(4, 16)
    graph = graphq.calibrate(graphq.prepare(model, "int8_weight_only", (x,)), [x], progress=False)
    before = model(x), graph(x)
    folded = graphq.fold_weights(graph)
    assert sum(t.numel() for t in folded.state_dict().values()) == sum(p.numel() for p in model.parameters())
    folded.half()
    assert torch.equal(model(x), before[0]) and torch.equal(graph(x), before[1])
