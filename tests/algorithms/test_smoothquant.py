"""SmoothQuant: the float function is kept, outliers leave the activations, norms take scales in where they may."""

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms.samples import RowSamples
from graphq.algorithms.scaling import SMOOTHED
from graphq.algorithms.smoothquant import _rounded_weight, _scale
from graphq.config.config import Algorithm
from graphq.config.presets import CONFIGS
from graphq.errors import ConfigError
from graphq.graph.view import parameter

SMOOTH = CONFIGS["int8_smoothquant"]


class Block(nn.Module):
    """A norm, three projections of it, and a residual stream before it (pre) or behind it (post)."""

    def __init__(self, post: bool):
        super().__init__()
        self.norm, self.post = nn.LayerNorm(32), post
        self.q, self.k, self.v = (nn.Linear(32, 24) for _ in range(3))
        self.out = nn.Linear(24, 32)
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[17] = 60.0, 25.0

    def forward(self, x):
        y = self.norm(x)
        return (y if self.post else x) + self.out(torch.tanh(self.q(y)) * torch.tanh(self.k(y)) + self.v(y))


def data(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 32, generator=generator) for _ in range(count)]


def smoothed_with(alpha, model=None):
    config = SMOOTH.model_copy(update={"algorithms": (Algorithm(name="smoothquant", args={"alpha": alpha}),)})
    return calibrated(model or Block(post=False).eval(), config)


def norm_of(graph):
    """The norm's weight as the graph has it."""
    return parameter(graph, next(n for n in graph.graph.nodes if "layer_norm" in str(n.target)).args[2])


def calibrated(model, config, **options):
    return graphq.calibrate(graphq.prepare(model, config, (data()[0],), **options), data(), progress=False)


@pytest.mark.parametrize("post", [False, True], ids=["pre-norm", "post-norm"])
def test_outlier_channels_cost_less_and_the_group_has_one_scale(post, tmp_path):
    model = Block(post).eval()
    figures = {}
    for config in ("int8", "int8_smoothquant"):
        graph = graphq.convert(calibrated(model, config))
        figures[config] = graphq.compare(model, graph, data(), per_op=False).sqnr
        path = graphq.export(graph, tmp_path / "m.onnx")
        assert graphq.verify(graph, path, data()).agrees and not graphq.explain(graph, path).disagreements
    assert figures["int8_smoothquant"] > figures["int8"] + 3
    rows = graphq.explain(graph).rows
    smoothed = [r for r in rows if "; scaled by channel" in r.reason]
    assert {"q", "k", "v"} <= {r.layer for r in smoothed}
    multiplications = [r for r in rows if "divides by scales" in r.reason]
    norm = next(n for n in graph.graph.nodes if "layer_norm" in str(n.target))
    assert [norm.name, not post] in graph.meta[SMOOTHED]
    assert (
        any("smoothed" in str(a.target) for a in norm.all_input_nodes) is not post
    )  # folded, where nothing else reads it
    assert any(norm in n.all_input_nodes for n in graph.graph.nodes if n.name.endswith("_smoothed")) is post
    assert len(multiplications) == len(graph.meta[SMOOTHED]) - (not post)


@pytest.mark.parametrize("post", [False, True])
def test_the_float_function_is_kept(post):
    model = Block(post).eval()
    exact = SMOOTH.model_copy(update={"bias_correction": False})  # and no guard: both change weights or biases
    prepared = calibrated(model, exact, target=graphq.get_target("onnxruntime", cpu="vnni"))
    for quantizer in graphq.quantizer.quantizers(prepared).values():
        quantizer.state = "off"
    assert prepared.meta[SMOOTHED]
    for x in data():
        assert torch.allclose(prepared(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_scale_is_that_of_the_paper():
    x, w = torch.tensor([1.0, 100.0, 4.0]), torch.tensor([0.5, 0.25, 1.0])
    ours = _scale(x, w, 0.7)
    wanted = x.double() ** 0.7 / w.double() ** 0.3
    assert torch.allclose(ours.double() / ours[0], wanted / wanted[0], rtol=1e-5)
    assert ours.log().sum().abs() < 1e-5


def test_minilm_gains_three_decibels_at_least(minilm):
    shapes = {"dynamic_shapes": "batch+sequence", "progress": False}
    smoothed = graphq.quantize(minilm.model, SMOOTH, minilm.calibration, **shapes)
    plain, smooth = (
        graphq.compare(minilm.model, graph, minilm.held_out[:1], per_op=False).sqnr
        for graph in (minilm.quantized, smoothed)
    )
    assert smooth > 20 and smooth > plain + 3


def test_a_saved_graph_continues_where_it_was(tmp_path):
    model = Block(True).eval()
    graph = calibrated(model, "int8_smoothquant")
    loaded = graphq.load(graphq.save(graph, tmp_path / "g"), model)
    x = data()[0]
    assert torch.equal(loaded(x), graph(x))
    assert torch.equal(graphq.convert(loaded)(x), graphq.convert(graph)(x))


def test_ops_whose_channels_are_scaled_are_not_compared_with_those_of_the_float_model(tmp_path):
    model = Block(post=False).eval()
    graph = calibrated(model, "int8_smoothquant")
    norm = next(n.name for n in graph.graph.nodes if "layer_norm" in str(n.target))
    with torch.no_grad():
        assert not torch.allclose(norm_of(graph), model.norm.weight)
    for quantized in (graph, graphq.convert(graph), graphq.load(graphq.save(graph, tmp_path / "g"), model)):
        ops = graphq.compare(model, quantized, data()).ops
        assert norm not in {o.node for o in ops} and len(ops) >= 4 and min(o.sqnr for o in ops) > 15


def test_two_targets_are_smoothed_alike():
    both = graphq.prepare(Block(True).eval(), SMOOTH, (data()[0],), target=["onnxruntime", "tensorrt"])
    graphq.calibrate(both, data(), progress=False)
    first, second = both.values()
    assert first.meta[SMOOTHED] == second.meta[SMOOTHED] != []
    ours = [b for n, b in first.named_buffers() if "smoothing" in n]
    theirs = [b for n, b in second.named_buffers() if "smoothing" in n]
    assert ours and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_generator_of_data_serves_both_runs():
    model = Block(True).eval()
    prepared = graphq.prepare(model, SMOOTH, (data()[0],))
    graphq.calibrate(prepared, (x for x in data()), progress=False)
    assert torch.equal(graphq.convert(prepared)(data()[0]), graphq.convert(calibrated(model, SMOOTH))(data()[0]))


def test_unknown_algorithms_and_arguments_are_named():
    for algorithm, message in (
        ("smothquant", "smoothquant"),
        (Algorithm(name="smoothquant", args={"alfa": 1}), "alpha"),
    ):
        config = SMOOTH.model_copy(update={"algorithms": (Algorithm.model_validate(algorithm),)})
        with pytest.raises(ConfigError, match=message):
            graphq.prepare(Block(True), config, (data()[0],))
    wild = SMOOTH.model_copy(update={"algorithms": (Algorithm(name="smoothquant", args={"alpha": 3}),)})
    with pytest.raises(ConfigError, match="0 to 1"):
        calibrated(Block(True).eval(), wild)


def test_samples_are_bounded_and_ranges_are_of_all_rows():
    samples, rows = RowSamples(most=64), torch.randn(1000, 5)
    for part in rows.split(37):
        samples(part)
    assert 16 <= len(samples.rows) <= 64 and samples.count == 1000
    assert torch.equal(samples.lowest.amin(0), rows.amin(0)) and torch.equal(samples.highest.amax(0), rows.amax(0))
    assert torch.equal(samples.rows, torch.cat([rows[:: samples.step]]))
    for half in (0, 1):
        kept = samples.rows_in(half)
        assert 8 <= len(kept) <= len(samples.rows) - 8
        assert (kept >= samples.lowest[half]).all() and (kept <= samples.highest[half]).all()
    assert not torch.equal(samples.lowest[0], samples.lowest[1])


@pytest.mark.parametrize("period", [2, 3, 5, 16, 65, 128, 257])
def test_both_halves_see_what_comes_with_every_sample(period):
    samples, rows = RowSamples(most=64), torch.randn(64 * period, 3)
    rows[::period, 1] = 100  # a class token
    for part in rows.split(period):
        samples(part)
    assert (samples.highest[:, 1] == 100).all()


@pytest.mark.parametrize("count", [16, 48])
def test_a_layer_that_sees_few_rows_is_not_fitted_to_them(count):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    few, others = (torch.randn(n, 128, generator=generator) for n in (count, 512))
    plain, smooth = (
        graphq.compare(model, graphq.quantize(model, config, list(few.split(8)), progress=False), [others]).sqnr
        for config in ("int8", "int8_smoothquant")
    )
    assert smooth > plain - 1


def test_one_row_gives_nothing_to_judge_by():
    model = Block(post=False).eval()
    graph = graphq.prepare(model, "int8_smoothquant", (data()[0][:1],))
    graphq.calibrate(graph, [data()[0][:1]], progress=False)
    assert not graph.meta[SMOOTHED]


class Uneven(nn.Module):
    """What reads h differs by target: ONNX Runtime quantizes the sum too, TensorRT does not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
        self.e = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = self.a(x)
        v = self.b(h)
        return self.d(torch.tanh(v) * 0.01), self.e(self.c(x) + h)


@pytest.mark.parametrize("order", [("torch_compile", "onnxruntime"), ("onnxruntime", "torch_compile")])
def test_targets_with_other_groups_do_not_take_each_others_statistics(order):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(3)]
    config = SMOOTH.model_copy(update={"algorithms": (Algorithm(name="smoothquant", args={"alpha": 0.5}),)})
    model = Uneven().eval()
    both = graphq.quantize(model, config, batches, target=list(order), progress=False)
    alone = graphq.quantize(model, config, batches, target="onnxruntime", progress=False)
    figures = [graphq.compare(model, g, batches, per_op=False).sqnr for g in (both["onnxruntime"], alone)]
    assert figures[0] > figures[1] - 3


def test_a_calibration_that_failed_can_be_repeated(tmp_path):
    model = Block(True).eval()
    prepared = graphq.prepare(model, SMOOTH, (data()[0],))
    passes = []

    def broken(model):
        passes.append(1)
        for x in data()[:2]:
            model(x)
        if len(passes) > 1:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        graphq.calibrate(prepared, broken, progress=False)
    graphq.calibrate(prepared, data(), progress=False)
    names = [name for name, _ in prepared.meta[SMOOTHED]]
    assert len(names) == len(set(names)) and not any("smoothed" in n for n in names)
    loaded = graphq.load(graphq.save(prepared, tmp_path / "g"), model)
    assert torch.equal(loaded(data()[0]), prepared(data()[0]))


def test_data_that_are_no_data_are_said_to_be_none():
    with pytest.raises(graphq.GraphqError):
        graphq.calibrate(graphq.prepare(Block(True), SMOOTH, (data()[0],)), 5, progress=False)


def test_logarithmic_scales_are_those_of_the_formula():
    model = Block(post=False).eval()
    largest = torch.cat([model.norm(x) for x in data()]).abs().amax(0).double()
    wanted = largest / torch.log2(2 + largest)
    wanted = wanted / wanted.log().mean().exp()
    found = model.norm.weight.double() / norm_of(smoothed_with("log", model)).double()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_alpha_by_selectors_is_that_of_each_group_and_the_last_that_fits_counts():
    model = Block(post=False).eval()
    by_name = norm_of(smoothed_with({"Linear": 0.3, "re:[qkv]": 0.7}, model))
    assert torch.equal(by_name, norm_of(smoothed_with(0.7, model)))
    untouched = smoothed_with({"re:[qkv]": None, "out": 0.5}, model)
    assert torch.equal(norm_of(untouched), model.norm.weight)
    assert torch.equal(norm_of(smoothed_with({"out": 0.5}, model)), norm_of(smoothed_with("search", model)))


@pytest.mark.parametrize(
    "alpha, match",
    [({"querry": 0.5}, "selects no linear"), ({"q": 0.5, "k": 0.6, "v": 0.5}, "several"), ({"q": 0.5}, "several"),
     ({"Linear": 2.0}, "number from 0 to 1"), (None, "number from 0 to 1"), ("sqrt", "number from 0 to 1")],
)  # fmt: skip
def test_alphas_that_cannot_be_meant_are_refused(alpha, match):
    with pytest.raises(ConfigError, match=match):
        smoothed_with(alpha)


def test_a_channel_that_is_zero_in_all_data_keeps_its_scale():
    activations, weights = torch.tensor([0.0, 4.0, 9.0]), torch.tensor([1.0, 2.0, 3.0])
    scale = _scale(activations, weights, 0.5)
    assert scale[0] == 1
    torch.testing.assert_close(scale[1:], _scale(activations[1:], weights[1:], 0.5))
    assert torch.equal(_scale(torch.zeros(3), weights, 0.5), torch.ones(3))


def test_the_search_sees_what_weights_in_groups_lose():
    spec = QuantSpec(format="int4", granularity="group", group_size=16)
    weight = torch.randn(8, 32)
    rounded = _rounded_weight(weight, spec)
    scale = weight.reshape(8, 2, 16).abs().amax(-1, keepdim=True) / 7
    torch.testing.assert_close(rounded, ((weight.reshape(8, 2, 16) / scale).round() * scale).reshape(8, 32))


def test_a_model_without_quantized_inputs_has_nothing_to_smooth_and_the_error_says_so():
    rules = (Rule(select="linear", scheme=Scheme(weight=QuantSpec(format="int8", granularity="channel"))),)
    config = QuantConfig(rules=rules, algorithms=("smoothquant",))
    prepared = graphq.prepare(nn.Sequential(nn.Linear(8, 8)), config, (torch.randn(2, 8),), target="simulation")
    with pytest.raises(ConfigError, match="no quantized tensor is read by quantized linears"):
        graphq.calibrate(prepared, [torch.randn(2, 8)], progress=False)
