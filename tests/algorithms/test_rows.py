"""Weights as matrices: their products with rows of inputs are what torch computes, and GPTQ of every convolution loses
what its result says, less than the nearest values lose."""

import copy
import itertools

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms.results import weight_results
from graphq.algorithms.rows import matrix_of, patches, spread, weight_of
from graphq.quantizer import quantizers

SHAPES = [  # rank, stride, padding, dilation, output padding: those that torch allows
    args for args in itertools.product((1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (0, 1)) if args[4] < max(args[1], args[3])
]
INT3 = QuantSpec(format="int3", granularity="channel", observer="mse_grid")


@pytest.mark.parametrize("rank, stride, padding, dilation, more", SHAPES)
def test_rows_times_the_matrix_are_what_a_transposed_convolution_gives(rank, stride, padding, dilation, more):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *(5, 4, 3)[:rank], dtype=torch.float64)
    weight = torch.randn(3, 4, *(3, 2, 3)[:rank], dtype=torch.float64)
    run = (nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d)[rank - 1]
    want = run(x, weight, None, stride, padding, more, 1, dilation)
    args = [[v] * rank for v in (stride, padding, dilation, more)]
    got = spread(x, weight, *args).flatten(1) @ matrix_of(weight, "conv_transpose").T
    torch.testing.assert_close(got, want.movedim(1, -1).reshape(len(got), -1))


@pytest.mark.parametrize("rank", (1, 2, 3))
def test_rows_times_the_matrix_are_what_a_convolution_gives(rank):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *(7, 6, 5)[:rank], dtype=torch.float64)
    weight = torch.randn(4, 3, *(3, 2, 3)[:rank], dtype=torch.float64)
    run = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[rank - 1]
    want = run(x, weight, None, 2, 1)
    got = patches(x, weight, [2] * rank, [1] * rank, [1] * rank).flatten(1) @ matrix_of(weight, "conv").T
    torch.testing.assert_close(got, want.movedim(1, -1).reshape(len(got), -1))


@pytest.mark.parametrize("family, shape", [
    ("linear", (4, 6)), ("experts", (3, 4, 6)), ("conv", (4, 6, 3, 2)), ("conv_transpose", (6, 4, 3, 2)),
    ("conv", (4, 6, 5)), ("conv_transpose", (6, 4, 2, 3, 2)),
])  # fmt: skip
def test_a_matrix_goes_back_into_the_weight_that_it_was(family, shape):
    weight = torch.randn(shape)
    assert torch.equal(weight_of(matrix_of(weight, family), shape, family), weight)


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, 2, 1), 1), "conv3d": (nn.Conv3d(4, 6, 2), 3),
    "conv2d, groups": (nn.Conv2d(4, 6, 3, groups=2), 2),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, 2, 1, 1), 1),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), 2),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 6, 2, dilation=2), 3),
}  # fmt: skip


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("name", LAYERS)
def test_gptq_of_every_convolution_loses_what_it_says_and_less_than_the_nearest(name, granularity, tmp_path):
    layer, rank = LAYERS[name]
    torch.manual_seed(0)
    layer.reset_parameters()
    mixing = torch.randn(4, 4)
    data = [torch.einsum("oc,nc...->no...", mixing, torch.randn(4, 4, *[7] * rank)) for _ in range(4)]
    spec = INT3.model_copy(update={"granularity": granularity})
    rules = (Rule(select="conv | conv_transpose", scheme=Scheme(weight=spec)),)
    config = QuantConfig(rules=rules, algorithms=("gptq",))
    graph = graphq.prepare(layer.eval(), config, (data[0],), target="simulation")
    graph = graphq.calibrate(graph, data, progress=False, store=tmp_path / "store")
    (result,) = weight_results(graph)
    applied = graphq.apply_weights(graph, layer)
    with torch.no_grad():
        lost = sum(float((layer(x).double() - applied(x).double()).square().sum()) for x in data)
    assert result.output_squared_error == pytest.approx(lost, rel=1e-3)
    assert result.relative_output_squared_error < result.nearest
    (quantizer,) = quantizers(graph).values()
    axis = 1 if "transpose" in name else 0
    if granularity == "channel":
        assert list(quantizer.scale.shape) == [6 if d == axis else 1 for d in range(rank + 2)]
    assert torch.equal(quantizer(applied.weight), applied.weight)
    stored = graphq.apply_stored(tmp_path / "store", copy.deepcopy(layer))
    assert torch.allclose(stored.weight, applied.weight, rtol=1e-6, atol=1e-7)
