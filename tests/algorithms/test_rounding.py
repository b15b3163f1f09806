"""FPI-GPTQ, GPTAQ and AdaRound: the fixed point is GPTQ's, GPTAQ its definition, and learned rounding loses less than
the nearest values."""

import numpy as np
import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms.adaround import adaround
from graphq.algorithms.fpi_gptq import fpi_gptq
from graphq.algorithms.gptaq import gptaq
from graphq.algorithms.gptq import gptq
from graphq.algorithms.grid import Grid
from graphq.errors import CalibrationError, ConfigError

GROUPS = QuantSpec(format="int4", granularity="group", group_size=16)
ROWS = QuantSpec(format="uint4", granularity="channel", symmetric=False)


def problem(spec, width=32, out=24):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    x = torch.randn(200, width, generator=generator) @ mixing
    weight = torch.randn(out, width, generator=generator)
    return weight, x.T @ x, Grid(spec, spec.block_for(2), weight)


def lost(weight, chosen, hessian):
    error = (weight - chosen).double()
    return float(torch.trace(error @ hessian.double() @ error.T))


@pytest.mark.parametrize("spec", [GROUPS, ROWS], ids=["groups", "rows"])
def test_the_fixed_point_is_what_gptq_reaches(spec):
    weight, hessian, grid = problem(spec)
    ours, wanted = fpi_gptq(weight, hessian, grid, iterations=32), gptq(weight[None], hessian[None], grid)[0]
    assert (ours == wanted).float().mean() > 0.97  # float32 sums in another order at a tie, and what follows from it
    few = fpi_gptq(weight, hessian, grid, iterations=6)
    nearest = grid.rounded(weight)
    assert lost(weight, few, hessian) < 0.6 * lost(weight, nearest, hessian)


@pytest.mark.parametrize("spec", [GROUPS, ROWS], ids=["groups", "rows"])
def test_learned_rounding_goes_up_or_down_only_and_loses_less(spec):
    weight, hessian, grid = problem(spec)
    chosen, nearest = adaround(weight[None], hessian[None], grid)[0], grid.rounded(weight)
    assert torch.equal(grid.rounded(chosen), chosen)
    steps = (chosen - weight).abs() / grid.columns()[0]
    inside = (weight / grid.columns()[0]).abs() < 6
    assert steps[inside].max() < 1 + 1e-5
    assert lost(weight, chosen, hessian) < 0.5 * lost(weight, nearest, hessian)
    rows = [
        (lost(w[None], c[None], hessian), lost(w[None], n[None], hessian))
        for w, c, n in zip(weight, chosen, nearest, strict=True)
    ]
    assert all(a <= b * (1 + 1e-5) for a, b in rows)


def test_no_inputs_leave_the_nearest_values():
    weight, hessian, grid = problem(GROUPS)
    zeros, nearest = torch.zeros_like(hessian), grid.rounded(weight)
    assert torch.equal(fpi_gptq(weight, zeros, grid), nearest)
    assert torch.equal(adaround(weight[None], zeros[None], grid)[0], nearest)


QEP = {"qep": 0.5}


@pytest.mark.parametrize(("name", "args"), [("fpi_gptq", QEP), ("adaround", QEP), ("gptaq", {})])
def test_they_run_by_name_and_on_convolutions_too(name, args):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)
    ).eval()
    data = [torch.randn(8, 3, 6, 6) for _ in range(4)]
    noise = {}
    for algorithms in ((), ({"name": name, "args": args},)):
        spec = QuantSpec(format="int3", granularity="channel")
        config = QuantConfig(rules=(Rule(select="*", scheme=Scheme(weight=spec)),), algorithms=algorithms)
        graph = graphq.prepare(model, config, (data[0],), target="simulation")
        graphq.calibrate(graph, data, progress=False)
        noise[bool(algorithms)] = sum((graph(x) - model(x)).square().sum().item() for x in data)
    assert noise[True] < 0.7 * noise[False]


def test_wrong_arguments_and_formats_are_refused():
    weight, hessian, grid = problem(GROUPS)
    for call in (
        lambda: fpi_gptq(weight, hessian, grid, iterations=0),
        lambda: adaround(weight[None], hessian[None], grid, rate=0),
    ):
        with pytest.raises(ConfigError, match="positive"):
            call()
    spec = QuantSpec(format="fp4_e2m1", granularity="group", group_size=16)
    config = QuantConfig(rules=(Rule(select="*", scheme=Scheme(weight=spec)),), algorithms=("adaround",))
    graph = graphq.prepare(nn.Linear(16, 4).eval(), config, (torch.randn(2, 16),), target="simulation")
    with pytest.raises(CalibrationError, match="no next code"):
        graphq.calibrate(graph, [torch.randn(2, 16)], progress=False)


def test_gptaq_has_no_qep():
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    config = QuantConfig(
        rules=(Rule(select="*", scheme=Scheme(weight=ROWS)),), algorithms=({"name": "gptaq", "args": QEP},)
    )
    with pytest.raises(ConfigError, match="no argument 'qep'"):
        graphq.prepare(model, config, (torch.randn(4, 8),), target="simulation")


def asymmetric_problem(spec):
    """Inputs of the float model, and what has become of them, larger by a part of one another."""
    weight, _, grid = problem(spec)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    given = x + 0.3 * x @ torch.randn(32, 32, generator=generator) / 32**0.5
    return weight, x, given, grid


def by_definition(weight, hessian, cross, grid, alpha, damping=0.01):
    """Column by column, each with inverses of what is left, in float64."""
    w, h, c = (t.double().numpy() for t in (weight, hessian, cross))
    order = np.argsort(-h.diagonal(), kind="stable")
    h = (h + damping * h.diagonal().mean() * np.eye(len(h)))[order][:, order]
    w, c = w[:, order].copy(), c[order][:, order]
    first, scales = w.copy(), grid.columns()[0].numpy()[:, order].astype(np.float64)
    low, high = grid.spec.number_format.limits(grid.spec.narrow_range)
    result = np.empty_like(w)
    for i in range(len(order)):
        result[:, i] = np.clip(np.rint(w[:, i] / scales[:, i]), low, high) * scales[:, i]
        inverse = np.linalg.inv(h[i:, i:])
        w[:, i + 1 :] -= np.outer(w[:, i] - result[:, i], inverse[0, 1:] / inverse[0, 0])
        if i + 1 < len(order):
            w[:, i + 1 :] += alpha * np.outer(first[:, i], c[i, i + 1 :] @ np.linalg.inv(h[i + 1 :, i + 1 :]))
    return result[:, np.argsort(order)]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_gptaq_is_its_definition_column_by_column(alpha):
    weight, x, given, grid = asymmetric_problem(GROUPS)
    hessian, cross = given.T @ given, (x - given).T @ given
    ours = gptaq(weight, hessian, grid, cross=cross, alpha=alpha)
    wanted = by_definition(weight, hessian, cross, grid, alpha)
    assert np.isclose(ours.numpy(), wanted, atol=1e-4).mean() > 0.97  # the rest are ties, and what follows from them


def test_gptaq_is_nearer_to_the_products_of_the_float_model():
    weight, x, given, grid = asymmetric_problem(GROUPS)
    hessian, cross = given.T @ given, (x - given).T @ given
    losses = [
        float((x @ weight.T - given @ gptaq(weight, hessian, grid, cross=cross, alpha=a).T).square().sum())
        for a in (0.0, 0.5, 1.0)
    ]
    assert losses[2] < losses[1] < losses[0]
    with pytest.raises(ConfigError, match="alpha"):
        gptaq(weight, hessian, grid, alpha=2.0)
