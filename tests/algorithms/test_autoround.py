"""AutoRound: blocks are found in the graph, what they lose is less than that of the nearest codes, or that is kept."""

import pytest
import torch
from test_gptq import Decoder, correlated
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms import autoround as autoround_module
from graphq.algorithms.blocks import cut_into_blocks
from graphq.algorithms.layers import by_input
from graphq.calibration.stream import Stream
from graphq.errors import CalibrationError, ConfigError
from graphq.quantizer import quantizers

INT3 = QuantSpec(format="int3", granularity="group", group_size=16)


def config(spec=INT3, algorithm="autoround", **args):
    algorithms = ({"name": algorithm, "args": args},)
    return QuantConfig(rules=(Rule(select="linear | conv", scheme=Scheme(weight=spec)),), algorithms=algorithms)


def blocks_of(model, example, most, spec=INT3):
    prepared = graphq.prepare(model.eval(), config(spec), (example,), target="simulation")
    blocks = cut_into_blocks(Stream(prepared, [example]), by_input(prepared)[0], most)
    return [[layer.view.path for layer in block.layers] for block in blocks], blocks


def lost(graph, model, data):
    return sum((graph(x) - model(x)).square().mean().item() for x in data)


def test_a_block_of_a_decoder_is_its_seven_linears_and_ends_in_the_residual_stream():
    names, blocks = blocks_of(Decoder(3), correlated()[0], most=8)
    assert names == [[f"blocks.{i}.{n}" for n in ("q", "k", "v", "o", "gate", "up", "down")] for i in range(3)]
    assert [len(b.results) for b in blocks] == [1, 1, 1] and all("add" in b.stop.name for b in blocks)
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]


@pytest.mark.parametrize("most, sizes", [(1, [3, 1, 3, 4, 3]), (4, [4, 3, 4, 3]), (7, [7, 7]), (14, [14])])
def test_parts_are_joined_while_they_have_few_layers(most, sizes):
    assert [len(b) for b in blocks_of(Decoder(2), correlated()[0], most)[0]] == sizes


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Linear(8, 4),
        )

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(x.mean((2, 3)))


def test_convolutions_around_a_residual_branch_are_one_block():
    spec = QuantSpec(format="int3", granularity="channel")
    assert blocks_of(Residual(), torch.randn(2, 3, 8, 8), 1, spec)[0] == [["stem"], ["a", "b"], ["head"]]


def test_what_it_learns_loses_less_on_new_data_than_the_nearest_codes_and_lies_on_the_grid():
    torch.manual_seed(0)
    model, data = Decoder(2).eval(), correlated(count=12)
    found = {}
    for name in ("rtn", "autoround"):
        args = {"iterations": 100} if name == "autoround" else {}
        graph = graphq.prepare(model, config(algorithm=name, **args), (data[0],), target="simulation")
        found[name] = graphq.calibrate(graph, data[:9], progress=False)
    assert lost(found["autoround"], model, data[9:]) < 0.7 * lost(found["rtn"], model, data[9:])
    results = graphq.weight_results(found["autoround"])
    assert len(results) == 14 and {r.algorithm for r in results} == {"autoround"}
    for node in found["autoround"].graph.nodes:
        quantizer = quantizers(found["autoround"]).get(str(node.target)) if node.op == "call_module" else None
        if quantizer is not None and quantizer.constant:
            weight = found["autoround"].get_buffer(str(node.args[0].target))
            torch.testing.assert_close(quantizer(weight), weight, rtol=1e-5, atol=1e-6)


def test_convolutions_and_zero_points_are_learned_too():
    torch.manual_seed(0)
    model = Residual().eval()
    data = [torch.randn(4, 3, 8, 8) for _ in range(6)]
    spec = QuantSpec(format="uint3", symmetric=False, granularity="channel")
    graphs = [
        graphq.calibrate(graphq.prepare(model, config(spec, name, **args), (data[0],), target="simulation"), data,
                         progress=False)
        for name, args in (("rtn", {}), ("autoround", {"iterations": 100}))
    ]  # fmt: skip
    new = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    assert lost(graphs[1], model, new) < lost(graphs[0], model, new)


def test_a_block_that_gains_nothing_on_held_out_data_is_rounded_to_the_nearest_and_says_so(monkeypatch):
    model, data = Decoder(1).eval(), correlated()
    monkeypatch.setattr(autoround_module._Rounding, "step", lambda self, rate: self.up.data.uniform_(-0.5, 0.5))
    graphs = [
        graphq.calibrate(graphq.prepare(model, config(algorithm=name), (data[0],), target="simulation"), data,
                         progress=False)
        for name in ("rtn", "autoround")
    ]  # fmt: skip
    assert torch.equal(graphs[0](data[0]), graphs[1](data[0]))
    assert "held-out data say" in str(graphq.explain(graphs[1]))


def test_it_is_deterministic():
    model, data = Decoder(1).eval(), correlated()
    first, second = (
        graphq.calibrate(graphq.prepare(model, config(iterations=5), (data[0],), target="simulation"), data,
                         progress=False)(data[0])
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(first, second)


def test_a_run_that_fails_leaves_the_graph_as_it_was(monkeypatch):
    model, data = Decoder(2).eval(), correlated()
    prepared, untroubled = (graphq.prepare(model, config(iterations=2), (data[0],), target="simulation") for _ in "ab")
    learn, seen = autoround_module._Walk._learn, []

    def second_fails(self, *args):
        seen.append(1)
        if len(seen) == 2:
            raise CalibrationError("no memory")
        learn(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(autoround_module._Walk, "_learn", second_fails)
        with pytest.raises(CalibrationError, match="no memory"):
            graphq.calibrate(prepared, data, progress=False)
    assert not any(q.settled for q in quantizers(prepared).values())
    outputs = [graphq.calibrate(g, data, progress=False)(data[0]) for g in (prepared, untroubled)]
    assert torch.equal(*outputs)


def test_floats_and_wrong_arguments_are_refused():
    data = correlated()
    fp4 = QuantSpec(format="fp4_e2m1", granularity="group", group_size=16)
    for settings, match in ((config(fp4), "no next code"), (config(iterations=0), "positive")):
        prepared = graphq.prepare(Decoder(1).eval(), settings, (data[0],), target="simulation")
        with pytest.raises(ConfigError, match=match):
            graphq.calibrate(prepared, data, progress=False)


class Patches(nn.Module):
    """Reads its input first, as a ViT does, and reshapes by its sizes up to the end."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.embed(x).reshape(x.shape[0], 8, -1).transpose(1, 2)
        y = y + self.a(y).relu()
        return (y + self.b(y).relu()).reshape(x.shape[0], -1)


class Halves(nn.Module):
    """What is alive between two layers is a tuple."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        first, second = self.a(x).relu().chunk(2, -1)
        return self.c(self.b(first).relu() + second).argmax(-1)


def test_sizes_are_not_alive_and_a_layer_may_read_the_input():
    spec = QuantSpec(format="int3", granularity="channel")
    model, example = Patches().eval(), torch.randn(2, 3, 16, 16)
    prepared = graphq.prepare(model, config(spec), (example,), target="simulation",
                              dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))  # fmt: skip
    blocks = cut_into_blocks(Stream(prepared, [example]), by_input(prepared)[0], most=1)
    assert [[layer.view.path for layer in b.layers] for b in blocks] == [["embed"], ["a"], ["b"]]


def test_tuples_are_inside_of_blocks_and_integer_outputs_are_not_learned_on():
    torch.manual_seed(0)
    model, data = Halves().eval(), [torch.randn(8, 16) for _ in range(4)]
    assert blocks_of(model, data[0], most=1)[0] == [["a"], ["b"], ["c"]]
    graph = graphq.prepare(model, config(iterations=3), (data[0],), target="simulation")
    assert len(graphq.weight_results(graphq.calibrate(graph, data, progress=False))) == 3


def test_the_model_gets_no_gradients_and_padding_alone_changes_nothing():
    model, data = Decoder(1).eval(), correlated()
    mask = torch.ones(2, 40, dtype=torch.int64)
    batches = [(x, mask) for x in data] + [(data[0], torch.zeros_like(mask))]
    prepared = graphq.prepare(model, config(iterations=50), batches[0], target="simulation")
    graph = graphq.calibrate(prepared, batches, progress=False)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.isfinite(graph(*b)).all() for b in batches)
    assert not any("held-out data say" in r.reason for r in graphq.explain(graph).rows)


def test_what_is_not_finite_is_an_error_that_names_the_layer():
    model, data = Decoder(1).eval(), correlated()
    prepared = graphq.prepare(model, config(iterations=2), (data[0],), target="simulation")
    with pytest.raises(CalibrationError, match="finite"):
        graphq.calibrate(prepared, [data[0], data[1] * float("inf")], progress=False)


class Chain(nn.Module):
    def __init__(self, count=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(count))
        self.scores, self.boxes = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        x = x.mean((2, 3))
        return self.scores(x), self.boxes(x)


def test_quantized_activations_between_blocks_and_heads_that_only_the_output_reads():
    torch.manual_seed(0)
    model, data = Chain().eval(), [torch.randn(4, 4, 8, 8) for _ in range(4)]
    scheme = Scheme(weight=QuantSpec(format="int3", granularity="channel"), input=QuantSpec(format="int8"))
    algorithms = ({"name": "autoround", "args": {"iterations": 60, "layers": 2}},)
    settings = QuantConfig(rules=(Rule(select="linear | conv", scheme=scheme),), algorithms=algorithms)
    graph = graphq.calibrate(graphq.prepare(model, settings, (data[0],), target="simulation"), data, progress=False)
    results = graphq.weight_results(graph)
    assert len(results) == 9
    learned = {r.layer for r in results if r.relative_output_squared_error != r.nearest}
    assert "scores" in learned  # that only the output reads


def test_results_far_larger_than_what_a_block_reads_are_not_kept(monkeypatch):
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 512)).eval(), [torch.randn(8, 16)] * 4
    losses = []
    for large in (autoround_module.LARGE, 10**6):
        monkeypatch.setattr(autoround_module, "LARGE", large)
        prepared = graphq.prepare(model, config(iterations=10, layers=1), (data[0],), target="simulation")
        losses.append(lost(graphq.calibrate(prepared, data, progress=False), model, data))
    assert losses[0] == losses[1]
