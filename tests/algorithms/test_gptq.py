"""GPTQ and QEP give what their formulas say, on one pass of the data, and their codes reach the runtime."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms import autoround as autoround_module
from graphq.algorithms import sequential
from graphq.algorithms.gptq import gptq, inverse_factor
from graphq.algorithms.grid import Grid
from graphq.algorithms.layers import by_input
from graphq.algorithms.moments import moments_of
from graphq.algorithms.results import RESULTS
from graphq.calibration.stream import Stream
from graphq.config.presets import SCHEMES
from graphq.errors import CalibrationError, ConfigError
from graphq.quantizer import quantizers

gptq_module = sys.modules["graphq.algorithms.gptq"]  # the package has a function of that name
GROUPS = QuantSpec(format="int4", granularity="group", group_size=16)
ROWS = QuantSpec(format="uint4", granularity="channel", symmetric=False)


def config(*algorithms, spec=GROUPS, select="linear"):
    return QuantConfig(name="weights", rules=(Rule(select=select, scheme=Scheme(weight=spec)),), algorithms=algorithms)


def correlated(count=4, width=32, rows=40):
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    return [torch.randn(2, rows, width, generator=torch.Generator().manual_seed(i)) @ mixing for i in range(count)]


def hessian_of(data):
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in data])
    return rows.T @ rows


def by_elimination(weight, hessian, grid, order, damping=0.01):
    """Optimal brain surgery, column by column, in float64: the inverse shrinks by one column at every step."""
    w, h = weight.double().numpy().copy(), hessian.double().numpy().copy()
    h[np.diag_indices_from(h)] += damping * np.diag(h).mean()
    inverse, result = np.linalg.inv(h), np.zeros_like(w)
    scales, zeros = (t.expand(len(w), -1).double().numpy() for t in grid.columns())
    low, high = grid.spec.number_format.limits()
    for i in order:
        codes = np.clip(np.round(w[:, i] / scales[:, i]), low - zeros[:, i], high - zeros[:, i])
        result[:, i] = codes * scales[:, i]
        w -= np.outer(w[:, i] - result[:, i], inverse[i] / inverse[i, i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # done with
    return result


@pytest.mark.parametrize("spec", [GROUPS, ROWS], ids=["groups", "rows"])
@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("block", [5, 128])
def test_columns_are_those_of_the_inverse_that_shrinks(spec, order, block):
    weight, hessian = torch.randn(24, 32), hessian_of(correlated())
    grid = Grid(spec, spec.block_for(2), weight)
    places = list(range(32)) if order == "none" else hessian.diagonal().argsort(descending=True, stable=True).tolist()
    wanted = by_elimination(weight, hessian, grid, places)
    found = gptq(weight[None], hessian[None], grid, order=order, block=block)[0]
    steps = ((found.double().numpy() - wanted) / grid.columns()[0].double().numpy()).round()
    assert (steps != 0).mean() < 0.005  # float32 against float64 at a tie, and what follows from it
    assert torch.equal(grid.rounded(found), found)


GRIDS = {
    **{f: GROUPS.model_copy(update={"format": f}) for f in ("int4", "fp4_e2m1", "int8", "fp8_e4m3", "fp6_e2m3")},
    **{f"{f}, blocks": QuantSpec(format=f, granularity="block", block=(8, 16)) for f in ("int4", "fp8_e4m3")},
    "nvfp4": QuantSpec(format="nvfp4"),
    "mxfp4": QuantSpec(format="mxfp4"),
}


@pytest.mark.parametrize("arguments", [{}, {"order": "none"}, {"order": "none", "groups": "dynamic"}])
@pytest.mark.parametrize("name", list(GRIDS))
def test_products_are_closer_than_with_the_nearest_values(name, arguments):
    spec = GRIDS[name]
    weight, hessian = torch.randn(24, 32), hessian_of(correlated())
    grid = Grid(spec, spec.block_for(2), weight)
    nearest = weight - grid.rounded(weight)
    error = weight - gptq(weight[None], hessian[None], grid, **arguments)[0]
    assert ((error @ hessian) * error).sum() < 0.8 * ((nearest @ hessian) * nearest).sum()


def test_dead_columns_and_too_few_rows_are_no_hindrance():
    x = correlated(1, rows=3)[0]
    x[..., [4, 9]] = 0
    weight, hessian = torch.randn(8, 32), hessian_of([x])
    grid = Grid(GROUPS, GROUPS.block_for(2), weight)
    found = gptq(weight[None], hessian[None], grid)[0]
    assert torch.isfinite(found).all() and torch.equal(found[:, [4, 9]], grid.rounded(weight)[:, [4, 9]])
    assert torch.equal(gptq(weight[None], torch.zeros(1, 32, 32), grid)[0], grid.rounded(weight))


def test_moments_that_are_no_numbers_are_refused():
    with pytest.raises(CalibrationError, match="too few directions"):
        inverse_factor(torch.full((1, 4, 4), torch.nan), torch.arange(4)[None], 0.01)


def test_damping_grows_for_the_group_that_needs_it_alone():
    torch.manual_seed(0)
    good = hessian_of(correlated())
    values, vectors = torch.linalg.eigh(good.double())
    values[0] = -0.02 * values.mean()  # more than the first damping makes good, less than the second
    bad = ((vectors * values) @ vectors.T).float()
    places = torch.arange(32).expand(2, 32)
    for factor, hessian, damping in zip(
        inverse_factor(torch.stack([good, bad]), places, 0.01), (good, bad), (0.01, 0.1), strict=True
    ):
        exact = hessian.double().numpy()
        damped = exact + damping * np.mean(np.diag(exact)) * np.eye(32)
        found = factor.double().numpy()
        assert np.allclose(np.tril(found, -1), 0)
        assert np.allclose(found.T @ found @ damped, np.eye(32), atol=1e-3)


def test_qep_moves_the_weight_by_what_its_inputs_have_lost():
    weight, exact = torch.randn(6, 8), torch.randn(50, 8)
    rounded = exact + 0.1 * torch.randn(50, 8)
    x, y = exact.double().numpy().T, rounded.double().numpy().T
    w = weight.double().numpy()
    damped = y @ y.T + 0.01 * np.mean(np.diag(y @ y.T)) * np.eye(8)
    wanted = w @ (x - y) @ y.T @ np.linalg.inv(damped)
    found = sequential._correction(weight, rounded.T @ rounded, (exact - rounded).T @ rounded, 0.01)
    assert np.allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-6)


class Decoder(nn.Module):
    """The shape of a Llama's block: q, k, v read one tensor, gate and up another."""

    def __init__(self, layers=2, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.RMSNorm(width), "q": nn.Linear(width, width), "k": nn.Linear(width, width),
                "v": nn.Linear(width, width), "o": nn.Linear(width, width), "norm2": nn.RMSNorm(width),
                "gate": nn.Linear(width, 48), "up": nn.Linear(width, 48), "down": nn.Linear(48, width),
            }) for _ in range(layers)
        )  # fmt: skip

    def forward(self, x, attention_mask=None):
        for b in self.blocks:
            y = b["norm"](x)
            q, k, v = (b[n](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv")
            x = x + b["o"](nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            y = b["norm2"](x)
            x = x + b["down"](nn.functional.silu(b["gate"](y)) * b["up"](y))
        return x if attention_mask is None else x * attention_mask[..., None]


@pytest.mark.parametrize("qep", [0.0, 0.5])
def test_moments_are_computed_once_for_layers_that_read_one_tensor_and_ops_run_once(qep, monkeypatch):
    moments, ops = [], []
    compute, step = sequential.moments_of, Stream._step
    monkeypatch.setattr(sequential, "moments_of", lambda *a, **k: moments.append(1) or compute(*a, **k))
    monkeypatch.setattr(Stream, "_step", lambda self, node, values: ops.append(node.name) or step(self, node, values))
    model, data = Decoder().eval(), correlated()
    graph = graphq.quantize(model, config({"name": "gptq", "args": {"qep": qep}}), data, progress=False)
    assert len(graph.meta[RESULTS]) == 14 and len(moments) == 8
    assert max(ops.count(name) for name in set(ops)) == len(data) * (2 if qep else 1)


def test_layers_see_the_inputs_that_rounded_layers_give_and_qep_helps():
    model, data = Decoder(2).eval(), correlated(8)
    held = correlated(9)[8:]
    quality = {}
    for name, algorithms in {
        "nearest": ["rtn"], "gptq": ["gptq"], "qep": [{"name": "gptq", "args": {"qep": 0.5}}]
    }.items():  # fmt: skip
        graph = graphq.quantize(model, config(*algorithms), data, progress=False)
        quality[name] = graphq.compare(model, graph, held, per_op=False).sqnr
        for result in graph.meta[RESULTS]:
            assert result.relative_output_squared_error <= result.nearest * 1.001 and result.layer
    assert quality["nearest"] + 1.5 < quality["gptq"] < quality["qep"]


class Shuffled:
    """A loader: other batches come first every time."""

    def __init__(self, data):
        self.data, self.turn = data, 0

    def __iter__(self):
        self.turn += 1
        return iter(self.data[self.turn :] + self.data[: self.turn])


def weights_of(model, algorithm, data, **options):
    graph = graphq.quantize(model, config(algorithm), data, progress=False, **options)
    return {n: b for n, b in graph.named_buffers() if n.endswith("codes")}


def test_a_loader_that_shuffles_gives_float_and_rounded_inputs_of_the_same_samples():
    model, data, qep = Decoder(1).eval(), correlated(), {"name": "gptq", "args": {"qep": 1.0}}
    once = weights_of(model, qep, data[1:] + data[:1])
    assert len({len(x) for x in data}) == 1  # so that nothing but the samples themselves would tell
    shuffled = graphq.prepare(model, config(qep), (data[0],))
    graph = graphq.convert(graphq.calibrate(shuffled, Shuffled(data), progress=False))
    found = {n: b for n, b in graph.named_buffers() if n.endswith("codes")}
    assert found.keys() == once.keys() and all(torch.equal(found[n], once[n]) for n in once)


def test_layers_that_qep_leaves_alone_are_rounded_as_they_are():
    model, data = Decoder(1).eval(), correlated()
    plain, qep = ({"name": "gptq", "args": a} for a in ({}, {"qep": 1.0}))
    every = {"name": "gptq", "args": {"qep": 1.0, "qep_exclude": ["linear"]}}
    last = {"name": "gptq", "args": {"qep": 1.0, "qep_exclude": ["*.down"]}}
    none, all_, without, but = (weights_of(model, a, data) for a in (plain, qep, every, last))
    assert all(torch.equal(none[n], without[n]) for n in none)
    different = {n for n in none if not torch.equal(all_[n], but[n])}
    assert len(different) == 1 and "down" in different.pop()


def test_without_propagation_every_layer_sees_the_inputs_of_the_float_model():
    model, data = Decoder(2).eval(), correlated()
    graph = graphq.prepare(model, config({"name": "gptq", "args": {"propagate_error": False}}), (data[0],))
    direct = graphq.compare_algorithms(graph, data, ["gptq"], progress=False)
    found = graphq.weight_results(graphq.calibrate(graph, data, progress=False))
    assert [r.layer for r in found] == [r.layer for r in direct] and len(found) == 14
    for a, b in zip(found, direct, strict=True):
        assert a.output_squared_error == pytest.approx(b.output_squared_error, rel=1e-3)


@pytest.mark.parametrize("arguments, match", [
    ({"qep": 0.5, "propagate_error": False}, "inputs have lost nothing"),
    ({"qep_exclude": ["*.down"]}, "qep_exclude is for qep"),
    ({"qep": 0.5, "qep_exclude": ["*.dwon"]}, "selects no layer"),
])  # fmt: skip
def test_what_qep_cannot_do_is_refused(arguments, match):
    with pytest.raises(ConfigError, match=match):
        weights_of(Decoder(1).eval(), {"name": "gptq", "args": arguments}, correlated())


def test_round_to_nearest_as_an_algorithm_is_what_happens_without_one():
    model, data = Decoder(1).eval(), correlated()
    plain, named = (graphq.quantize(model, config(*a), data, progress=False) for a in ((), ("rtn",)))
    assert torch.equal(plain(data[0]), named(data[0]))


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
def test_tokens_that_the_mask_leaves_out_do_not_count(algorithm):
    model, data = Decoder(1).eval(), correlated()
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[:, 25:] = 0
    noisy = [x.clone() for x in data]
    for x in noisy:
        x[:, 25:] = 1000 * torch.randn(2, 15, 32)
    grids = []
    for batches in (data, noisy):
        for given in ([{"x": x, "attention_mask": mask} for x in batches], [(x, mask) for x in batches]):
            graph = graphq.quantize(model, config(algorithm, select="blocks.0.q"), given, progress=False)
            grids.append(next(b for n, b in graph.named_buffers() if n.endswith("codes")))
    assert all(torch.equal(grids[0], other) for other in grids[1:])


@pytest.mark.parametrize("algorithm", ["gptq", "fpi_gptq", "adaround"])
@pytest.mark.parametrize("rows", [32, 2048])
def test_what_few_rows_teach_is_taken_back_where_it_is_worse_on_others(algorithm, rows):
    torch.manual_seed(0)
    mixing = torch.randn(128, 128) * torch.logspace(0, -2, 128)
    model, few = nn.Linear(128, 32).eval(), list((torch.randn(rows, 128) @ mixing).split(rows // 4))
    others = torch.randn(2048, 128) @ mixing
    sqnr = {}
    for name in ("rtn", algorithm):
        settings = config(name, spec=QuantSpec(format="int4", granularity="channel"))
        graph = graphq.quantize(model, settings, few, target="simulation", progress=False)
        sqnr[name] = graphq.compare(model, graph, [others], per_op=False).sqnr
    [result] = graphq.weight_results(graph)
    if rows == 32:
        assert result.taken_back == (0,) and sqnr[algorithm] == sqnr["rtn"] and "held-out" in result.words()
    else:
        assert result.taken_back == () and sqnr[algorithm] > sqnr["rtn"] + 0.5


def test_rows_that_are_held_out_teach_nothing_and_where_many_are_seen_none_is():
    torch.manual_seed(0)
    layer = next(iter(by_input(graphq.prepare(nn.Linear(32, 8), config(), (torch.randn(2, 32),)))[0].values()))[0]
    few, many = torch.randn(100, 32), torch.randn(200, 32)
    stream = SimpleNamespace(masks=[None])
    moments = moments_of(layer, [few], None, stream)
    held = moments.held[0]
    assert 5 <= len(held) <= 25 and moments.rows == 100 - len(held)
    assert all((few == row).all(1).any() for row in held)
    torch.testing.assert_close(moments.hessian[0] + held.T @ held, few.T @ few, rtol=1e-4, atol=1e-4)
    for x, kwargs in ((many, {}), (few, {"hold_out": False}), (few[:10], {})):
        moments = moments_of(layer, [x], None, stream, **kwargs)
        assert moments.held == [None] and moments.rows == len(x)
        torch.testing.assert_close(moments.hessian[0], x.T @ x, rtol=1e-4, atol=1e-4)


def test_each_group_is_judged_by_its_own_rows():
    torch.manual_seed(0)
    weight = torch.randn(8, 32)
    grid = Grid(ROWS, ROWS.block_for(2), weight)
    better, worse = weight[:4] + 1e-4, weight[4:] + 1
    held = [torch.randn(6, 32), torch.randn(6, 32)]
    found, back = sequential._judged(weight, torch.cat([better, worse]), grid, held)
    assert back == (1,) and torch.equal(found, torch.cat([better, grid.rounded(weight)[4:]]))
    assert sequential._judged(weight, torch.cat([better, worse]), grid, [held[0], None])[1] == ()


def test_numbers_that_are_none_are_found_in_rows_that_are_held_out_too():
    layer = next(iter(by_input(graphq.prepare(nn.Linear(32, 8), config(), (torch.randn(2, 32),)))[0].values()))[0]
    for row in range(100):
        x = torch.ones(100, 32)
        x[row, 3] = torch.nan
        with pytest.raises(CalibrationError, match="not finite"):
            moments_of(layer, [x], None, SimpleNamespace(masks=[None]))


@pytest.mark.parametrize("sizes", [[0, 0, 50, 50], [1, 40, 0, 60], [100]])
def test_batches_of_any_size_are_few_rows_together(sizes):
    layer = next(iter(by_input(graphq.prepare(nn.Linear(32, 8), config(), (torch.randn(2, 32),)))[0].values()))[0]
    inputs = [torch.randn(n, 32) for n in sizes]
    moments = moments_of(layer, inputs, None, SimpleNamespace(masks=[None] * len(sizes)))
    assert 4 <= len(moments.held[0]) <= 30 and moments.rows + len(moments.held[0]) == sum(sizes)


def test_of_convolutions_whole_images_are_held_out():
    model = nn.Sequential(nn.Conv2d(8, 4, 3))
    prepared = graphq.prepare(model, config(spec=ROWS, select="conv"), (torch.randn(1, 8, 5, 5),))
    layer = next(iter(by_input(prepared)[0].values()))[0]
    images = torch.arange(24.0).reshape(24, 1, 1, 1).expand(24, 8, 5, 5)
    moments = moments_of(layer, list(images.split(4)), None, SimpleNamespace(masks=[None] * 6))
    numbers, counts = moments.held[0][:, 0].unique(return_counts=True)
    assert 1 <= len(numbers) <= 8 and (counts == 9).all() and moments.rows == 9 * (24 - len(numbers))
    few = moments_of(layer, [images[:8]], None, SimpleNamespace(masks=[None]))
    assert few.held == [None] and few.rows == 72


@pytest.mark.parametrize("arguments", [{"groups": "dynamic", "order": "none"}, {}])
def test_groups_that_are_found_on_the_way_are_not_judged_by_scales_of_another_weight(arguments):
    torch.manual_seed(0)
    model, few = nn.Linear(128, 32).eval(), [torch.randn(32, 128)]
    graph = graphq.quantize(
        model, config({"name": "gptq", "args": arguments}), few, target="simulation", progress=False
    )
    [result] = graphq.weight_results(graph)
    assert bool(result.taken_back) is not bool(arguments)


WEIGHT_ALGORITHMS = ["rtn", "gptq", "fpi_gptq", "gptaq", "adaround", "autoround", "awq"]


@pytest.mark.parametrize("algorithm", WEIGHT_ALGORITHMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_refused_and_the_layer_is_named(algorithm, value):
    model, data = Decoder(1).eval(), correlated()
    data[1][0, 3, 2] = value
    prepared = graphq.prepare(model, config(algorithm), (data[0],), target="simulation")
    with pytest.raises(CalibrationError, match=r"not finite(.|\n)*blocks\.0"):
        graphq.calibrate(prepared, data, progress=False)


@pytest.mark.parametrize("algorithm", WEIGHT_ALGORITHMS)
def test_a_mask_that_leaves_no_token_is_an_error_and_not_a_weight(algorithm):
    model, data = Decoder(1).eval(), correlated()
    batches = [(x, torch.zeros(2, 40, dtype=torch.int64)) for x in data]
    prepared = graphq.prepare(model, config(algorithm), batches[0], target="simulation")
    with pytest.raises(CalibrationError, match=r"no (calibration data|token)(.|\n)*blocks\.0(.|\n)*remedy"):
        graphq.calibrate(prepared, batches, progress=False)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_are_matrices_of_patches(groups):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(8, 6, 1)).eval()
    mixing = torch.randn(4, 4)
    smooth = [nn.functional.avg_pool2d(torch.einsum("oc,nchw->nohw", mixing, torch.randn(2, 4, 14, 14)), 3, 1)
              for _ in range(6)]  # fmt: skip
    spec = QuantSpec(format="int4", granularity="channel")
    sqnr = []
    for algorithms in ((), ("gptq",)):
        settings = config(*algorithms, spec=spec, select="conv").model_copy(update={"bias_correction": False})
        graph = graphq.quantize(model, settings, smooth[:4], progress=False)
        sqnr.append(graphq.compare(model, graph, smooth[4:], per_op=False).sqnr)
    assert sqnr[1] > sqnr[0] + 1


def test_codes_reach_the_file_and_are_kept_when_saved(tmp_path):
    model, data = Decoder(1).eval(), correlated()
    graph = graphq.quantize(model, config("gptq"), data, progress=False)
    path = graphq.export(graph, tmp_path / "m.onnx")
    assert graphq.verify(graph, path, data[:1]).agrees
    rows = graphq.explain(graph, path)
    assert rows.kernels()["MatMulNBits"] == 7 and not rows.disagreements
    assert all("; gptq: " in r.reason for r in rows.rows if r.predicted == "MatMulNBits")
    loaded = graphq.load(graphq.save(graph, tmp_path / "saved"), model)
    assert torch.equal(loaded(data[0]), graph(data[0]))


def test_a_tied_weight_stays_with_the_nearest_values_and_says_so():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(20, 32), nn.Linear(32, 32), nn.Linear(32, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.mix(self.table(ids)))

    ids = [torch.randint(0, 20, (2, 7)) for _ in range(3)]
    graph = graphq.quantize(Tied().eval(), config("gptq", select="linear | embedding"), ids, progress=False)
    assert len(graph.meta[RESULTS]) == 1
    reasons = {r.layer: r.reason for r in graphq.explain(graph).rows if r.layer in ("table", "head", "mix")}
    assert "; gptq: " in reasons["mix"]
    assert all("to the nearest" in reasons[n] for n in ("table", "head"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"order": "sideways"}, "sideways"), ({"groups": "dynamic"}, "neighbours"), ({"qep": 2}, "from 0 to 1"),
     ({"block": 0}, "positive"), ({"qep": 0.5, "qep_damping": 0}, "positive"),
     ({"dampening": 1}, "no argument 'dampening'. Did you mean 'damping'")],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message.split(".")[0]):
        graphq.quantize(Decoder(1).eval(), config({"name": "gptq", "args": arguments}), correlated(), progress=False)


def test_what_it_cannot_work_with_is_refused():
    with pytest.raises(ConfigError, match="there is no weight to choose"):
        graphq.quantize(nn.Sequential(nn.ReLU()).eval(), config("gptq", select="*"), correlated(), progress=False)
    prepared = graphq.prepare(Decoder(1).eval(), config("gptq"), (correlated()[0],))
    with pytest.raises(CalibrationError, match="they are a function"):
        graphq.calibrate(prepared, lambda graph: graph(correlated()[0]), progress=False)


def test_the_algorithm_of_the_example_is_better_than_the_nearest_values():
    from own_algorithm import descent

    weight, hessian = torch.randn(24, 32), hessian_of(correlated())
    grid = Grid(GROUPS, GROUPS.block_for(2), weight)
    errors = [weight - found for found in (grid.rounded(weight), descent(weight, hessian, grid))]
    before, after = (((e @ hessian) * e).sum() for e in errors)
    assert after < 0.7 * before
    graph = graphq.quantize(Decoder(1).eval(), config("descent"), correlated(), progress=False)
    assert all(r.algorithm == "descent" for r in graph.meta[RESULTS])


def test_a_walk_that_fails_leaves_the_graph_as_it_was(monkeypatch):
    model, data = Decoder(1).eval(), correlated()
    prepared, untroubled = (graphq.prepare(model, config("gptq"), (data[0],)) for _ in range(2))
    walk, seen = gptq_module.walk, []

    def last_fails(*args, **kwargs):
        seen.append(1)
        if len(seen) == 3:  # the first is the trial of the arguments, the second q, k and v
            raise torch.linalg.LinAlgError("singular")
        return walk(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(gptq_module, "walk", last_fails)
        with pytest.raises(CalibrationError, match=r"singular[\s\S]*blocks.0.o"):
            graphq.calibrate(prepared, data, progress=False)
    assert not any(q.settled for q in quantizers(prepared).values())
    outputs = [graphq.calibrate(g, data, progress=False)(data[0]) for g in (prepared, untroubled)]
    assert torch.equal(*outputs)


def test_layers_of_one_tensor_are_walked_together_and_chosen_as_if_alone(monkeypatch):
    walk, seen = gptq_module.walk, []
    monkeypatch.setattr(gptq_module, "walk", lambda *args, **kwargs: (seen.append(1), walk(*args, **kwargs))[1])
    model, found = Decoder(1).eval(), []
    for most, calls in ((sequential.MOST, 1 + 4), (1, 1 + 7)):  # one is the trial of the arguments
        monkeypatch.setattr(sequential, "MOST", most)
        prepared = graphq.prepare(model, config("gptq"), (correlated()[0],))
        found.append(graphq.calibrate(prepared, correlated(), progress=False)(correlated()[0]))
        assert len(seen) == calls
        seen.clear()
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_weights_that_a_server_stacks_keep_one_scale_over_their_scales():
    spec = SCHEMES["NVFP4_DEFAULT_CFG"].weight
    prepared = graphq.prepare(Decoder(1).eval(), config("gptq", spec=spec), (correlated()[0],), target="simulation")
    found = quantizers(graphq.calibrate(prepared, correlated(), progress=False))
    overall = {n: q.overall.item() for n, q in found.items() if q.constant}
    assert len({v for n, v in overall.items() if n.endswith(("_q_weight", "_k_weight", "_v_weight"))}) == 1


@pytest.mark.parametrize("observer", ["minmax", "imatrix_mse"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_every_granularity_with_groups_found_on_the_way(granularity, observer):
    spec = QuantSpec(format="int4", granularity=granularity, group_size=16 if granularity == "group" else None,
                     observer=observer)  # fmt: skip
    algorithm = {"name": "gptq", "args": {"order": "none", "groups": "dynamic"}}
    graph = graphq.quantize(Decoder(1).eval(), config(algorithm, spec=spec), correlated(), progress=False)
    assert all(r.relative_output_squared_error < r.nearest for r in graph.meta[RESULTS])


def test_groups_that_do_not_divide_are_refused_with_the_layer():
    settings = config("gptq", spec=GROUPS.model_copy(update={"group_size": 20}))
    with pytest.raises(CalibrationError, match=r"no multiple of 20[\s\S]*blocks.0.q"):
        graphq.quantize(Decoder(1).eval(), settings, correlated(), target="simulation", progress=False)


def test_biases_are_corrected_for_what_the_chosen_weights_lose():
    settings = QuantConfig(rules=QuantConfig.load("int8").rules, algorithms=["rtn"], bias_correction=True)
    plain = settings.model_copy(update={"algorithms": ()})
    model, target = Decoder(1).eval(), graphq.get_target("onnxruntime", cpu="vnni")
    named, without = (graphq.quantize(model, s, correlated(), target=target, progress=False) for s in (settings, plain))
    biases = [{n: b for n, b in g.named_buffers() if "bias" in n} for g in (named, without)]
    assert biases[0].keys() == biases[1].keys() and any("corrected" in n for n in biases[0])
    assert all(torch.allclose(b, biases[1][n], atol=1e-4) for n, b in biases[0].items())


def test_targets_with_other_weights_are_observed_apart():
    model, data = Decoder(1).eval(), correlated()
    settings = QuantConfig(rules=QuantConfig.load("int8").rules, algorithms=["gptq"])
    both = graphq.quantize(model, settings, data, target=["onnxruntime", "tensorrt"], progress=False)
    alone = graphq.quantize(model, settings, data, target="tensorrt", progress=False)
    assert torch.equal(both["tensorrt"](data[0]), alone(data[0]))


def test_a_mask_counts_for_the_batch_that_it_came_with():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(32, 32)

        def forward(self, x, attention_mask):
            return self.q(x) * attention_mask[..., None]

    model, data = Bare().eval(), correlated()
    masks = [torch.arange(40)[None].expand(2, 40) < 10 + 5 * i for i, _ in enumerate(data)]
    codes = []
    for noise in (0, 1000):
        batches = [
            (torch.where(m[..., None], x, x + noise * torch.randn_like(x)), m) for x, m in zip(data, masks, strict=True)
        ]
        graph = graphq.quantize(model, config("awq", select="q"), batches, progress=False)
        codes.append([b for n, b in graph.named_buffers() if n.endswith(("codes", "smoothing"))])
    assert codes[0] and all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


def test_each_group_of_a_convolution_weighs_errors_by_its_own_inputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2)).eval()
    scale = torch.cat([30 * torch.rand(4), 300 * torch.rand(4)]).reshape(-1, 1, 1)
    data = [torch.randn(4, 8, 10, 10) * scale for _ in range(3)]
    spec = QuantSpec(format="int4", granularity="channel", observer="imatrix_mse")
    rules = (Rule(select="conv", scheme=Scheme(weight=spec)),)
    own, other = (
        graphq.quantize(model, QuantConfig(rules=rules, algorithms=a), data, target="simulation", progress=False)
        for a in (("rtn",), ())
    )
    scales = [next(b for n, b in g.named_buffers() if n.endswith("scale")) for g in (own, other)]
    # patches see each input a little less often at the border, the mean over the input does not
    torch.testing.assert_close(scales[0].flatten(), scales[1].flatten(), rtol=0.06, atol=0)


@pytest.mark.parametrize(
    "algorithm, corrected",
    [("gptq", True), ({"name": "gptq", "args": {"qep": 0.5}}, False), ("gptaq", False), ("autoround", False),
     ({"name": "gptq", "args": {"qep": 0.05}}, True),
     ({"name": "gptq", "args": {"qep": 0.5, "qep_exclude": "2"}}, None)],
)  # fmt: skip
def test_biases_are_left_alone_where_weights_make_good_what_inputs_have_lost(algorithm, corrected):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    data = [torch.randn(2, 3, 8, 8) + 1 for _ in range(3)]
    scheme = Scheme(
        weight=QuantSpec(format="int3", granularity="channel"), input=QuantSpec(format="uint8", symmetric=False)
    )
    config = QuantConfig(rules=(Rule(select="conv", scheme=scheme),), bias_correction=True, algorithms=(algorithm,))
    graph = graphq.calibrate(graphq.prepare(model, config, (data[0],)), data, progress=False)
    found = [n.meta["graphq"].reason.endswith("bias corrected") for n in graph.graph.nodes
             if n.op == "call_function" and "conv" in str(n.target)]  # fmt: skip
    assert found == [False, True] if corrected is None else found == [corrected, corrected]


def test_the_bias_of_a_weight_that_was_taken_back_to_the_nearest_is_corrected(monkeypatch, tmp_path):
    monkeypatch.setattr(autoround_module._Rounding, "step", lambda self, rate: self.up.data.uniform_(-0.5, 0.5))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    data = [torch.randn(2, 3, 8, 8) + 1 for _ in range(3)]
    inputs = QuantSpec(format="uint8", symmetric=False)
    scheme = Scheme(weight=QuantSpec(format="int3", granularity="channel"), input=inputs)
    config = QuantConfig(rules=(Rule(select="conv", scheme=scheme),), bias_correction=True, algorithms=("autoround",))
    for _ in range(2):  # and what the store gives back
        graph = graphq.prepare(model, config, (data[0],))
        graphq.calibrate(graph, data, progress=False, store=tmp_path / "store")
        reasons = [n.meta["graphq"].reason for n in graph.graph.nodes
                   if n.op == "call_function" and "conv" in str(n.target)]  # fmt: skip
        assert len(reasons) == 2 and all(("bias corrected" in r) is ("held-out data" in r) for r in reasons)
        assert any("bias corrected" in r for r in reasons)
