"""The observer imatrix_mse weights errors of a weight by the mean square of the inputs that they meet."""

import numpy as np
import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import CalibrationError

LAYERS = {
    "linear": (nn.Linear(32, 8, bias=False), (40, 32), -1, 1),
    "linear of sequences": (nn.Linear(32, 8, bias=False), (4, 10, 32), -1, 1),
    "conv": (nn.Conv2d(8, 6, 3, bias=False), (4, 8, 7, 7), 1, 1),
    "grouped conv": (nn.Conv2d(8, 6, 3, groups=2, bias=False), (4, 8, 7, 7), 1, 2),
}


def config(observer, **more):
    spec = QuantSpec(format="int4", granularity="channel", observer=observer, observer_args=more)
    return QuantConfig(name="t", rules=(Rule(select="linear | conv", scheme=Scheme(weight=spec)),))


def uneven(shape, axis, seed=0):
    """Channels of very different size."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    factors = torch.logspace(-2, 1, shape[axis])
    return x * factors.reshape([-1 if d == axis % len(shape) else 1 for d in range(len(shape))])


@pytest.mark.parametrize("name", LAYERS)
def test_the_scale_has_the_least_weighted_error_of_the_grid(name):
    layer, shape, axis, groups = LAYERS[name]
    batches = [uneven(shape, axis, seed) for seed in (1, 2)]
    graph = graphq.quantize(layer.eval(), config("imatrix_mse", patience=100), batches, progress=False)
    found = next(
        graph.get_parameter(str(n.target)) if n.target in dict(graph.named_parameters()) else graph.get_buffer(n.target)
        for n in graph.graph.nodes
        if n.op == "get_attr" and "scale" in str(n.target)
    )
    weight = layer.weight.detach().double().numpy()
    x = np.moveaxis(np.concatenate([b.double().numpy() for b in batches]), axis, -1)
    importance = (x**2).mean(tuple(range(x.ndim - 1))).reshape(groups, -1)
    for row, scale in enumerate(found.flatten().tolist()):
        w = weight[row].reshape(weight.shape[1], -1)
        columns = importance[row // (len(weight) // groups)][:, None]
        best = min(
            (
                ((np.abs(np.clip(np.rint(w / s), -8, 7) * s - w) ** 2 * columns).sum(), s)
                for s in (np.float32(np.abs(w).max() * (1 - i / 50) / 7) for i in range(20))
            ),
        )
        assert scale == pytest.approx(best[1], rel=1e-6)


def test_it_makes_the_output_better_where_inputs_are_uneven():
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64).eval(), uneven((512, 256), -1)

    def error(observer):
        graph = graphq.quantize(layer, config(observer), [x], progress=False)
        return (graph(x) - layer(x)).square().mean().item()

    assert error("imatrix_mse") < 0.97 * error("mse_grid") < error("minmax")


def test_activations_have_no_importance():
    spec = QuantSpec(format="uint8", symmetric=False, observer="imatrix_mse")
    scheme = Scheme(weight=QuantSpec(granularity="channel"), input=spec)
    prepared = graphq.prepare(
        nn.Linear(8, 8).eval(),
        QuantConfig(name="t", rules=(Rule(select="linear", scheme=scheme),)),
        (torch.randn(2, 8),),
    )
    with pytest.raises(CalibrationError, match="for weights"):
        graphq.calibrate(prepared, [torch.randn(2, 8)], progress=False)


def test_readers_along_different_axes_have_importances_of_their_own():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.l = nn.Conv1d(6, 4, 1, bias=False), nn.Linear(10, 4, bias=False)

        def forward(self, x):
            return self.c(x).mean(-1) + self.l(x).mean(1)

    torch.manual_seed(0)
    both, x = Both().eval(), uneven((3, 6, 10), 1)
    graph = graphq.quantize(both, config("imatrix_mse"), [x], progress=False)
    alone = graphq.quantize(both.c, config("imatrix_mse"), [x], progress=False)

    def scale(g):
        return next(v for k, v in g.named_buffers() if k.endswith("scale") and ("c_" in k or g is alone))

    assert torch.equal(scale(graph), scale(alone))


def test_a_tied_weight_is_judged_on_the_inputs_of_all_its_readers():
    class Twice(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.a, self.b, self.first = nn.Linear(16, 4, bias=False), nn.Linear(16, 4, bias=False), first
            self.b.weight = self.a.weight

        def forward(self, x, y):
            return self.a(x) + self.b(y) if self.first else self.b(y) + self.a(x)

    x, y = uneven((8, 16), -1), uneven((8, 16), -1, seed=3).flip(-1)
    found = []
    for first in (True, False):
        torch.manual_seed(0)
        graph = graphq.quantize(Twice(first).eval(), config("imatrix_mse"), [(x, y)], progress=False)
        found.append(next(v for k, v in graph.named_buffers() if k.endswith("scale")))
    assert torch.equal(*found)
