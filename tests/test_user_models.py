"""Models as users bring them: quantized, exported, run, verified, explained and compared without a special case."""

import math

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme


class MaskedAttention(nn.Module):
    """Fills its mask in place, which is why torch decomposes the graph."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x, padding):
        return self.attention(x, x, x, key_padding_mask=padding)[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0])


class ManyOutputs(nn.Module):
    """Indices, features, a scalar, and the input itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return y.argmax(-1), y, y.mean(), x


class ProductWithoutBias(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.w = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return self.linear(x).relu() @ self.w


PADDING = torch.tensor([[False] * 4 + [True] * 2] * 4)
CONVS = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 12 * 12, 5))
CASES = {
    "attention with a padding mask": (MaskedAttention, (torch.randn(4, 6, 16), PADDING), {}),
    "LSTM": (Recurrent, (torch.randn(4, 5, 8),), {"dynamic_shapes": None}),
    "bilinear resize": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(8, 4, 3)),
        (torch.randn(4, 3, 16, 16),),
        {},
    ),
    "several outputs": (ManyOutputs, (torch.randn(4, 4),), {}),
    "a product without bias": (ProductWithoutBias, (torch.randn(4, 4),), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_a_user(name, tmp_path):
    make, batch, options = CASES[name]
    verified(make().eval(), batch, tmp_path, **options)


def verified(model, batch, folder, config="int8", **options):
    quantized = graphq.quantize(model, config, [batch], progress=False, **options)
    path = graphq.export(quantized, folder / "model.onnx")
    result = graphq.verify(quantized, path, [batch])
    assert result.kernels_sqnr == math.inf and result.floats_sqnr > 90
    assert result.share_equal == 1.0 and result.unseen == []
    assert graphq.explain(quantized, path).disagreements == []
    assert graphq.compare(model, quantized, [batch]).sqnr > 10
    return quantized, path


AFFINE = QuantSpec(format="uint8", symmetric=False)
CHANNEL = QuantSpec(granularity="channel", narrow_range=True)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(weight=AFFINE, input=AFFINE),
        Scheme(weight=AFFINE.model_copy(update={"granularity": "channel"}), input=AFFINE),
        Scheme(weight=CHANNEL, input=QuantSpec(format="uint8", symmetric=True)),
    ],
    ids=["affine weights", "affine weights per channel", "symmetric activations"],
)
def test_other_schemes_are_simulated_as_exactly(scheme, tmp_path):
    config = QuantConfig(rules=(Rule(select="*", scheme=scheme),))
    verified(nn.Sequential(*CONVS).eval(), (torch.randn(4, 3, 16, 16),), tmp_path, config)


class Twice(nn.Module):
    """Gives one tensor back twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        y = self.first(x)
        z = self.second(y.relu())
        return z, y, z


def test_a_tensor_that_is_given_back_twice_is_verified(tmp_path):
    batch = torch.randn(4, 8)
    quantized = graphq.quantize(Twice().eval(), "int8", [batch], progress=False)
    result = graphq.verify(quantized, graphq.export(quantized, tmp_path / "model.onnx"), [batch])
    assert result.agrees and len(result.tensors) == 2 and result.output_sqnr > 100


def test_a_relu_is_not_skipped_where_codes_go_below_zero():
    config = QuantConfig(
        rules=(Rule(select="*", scheme=Scheme(weight=CHANNEL, input=AFFINE.model_copy(update={"symmetric": True}))),)
    )
    graph = graphq.prepare(nn.Sequential(*CONVS).eval(), config, (torch.randn(4, 3, 16, 16),))
    (relu,) = [r for r in graphq.explain(graph).rows if r.op == "relu"]
    assert relu.action == "float"


def test_comparing_leaves_frozen_batch_norms_frozen():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    model[1].eval()
    batch = (torch.randn(4, 3, 5, 5),)
    graphq.compare(model, graphq.quantize(model, "int8", [batch], progress=False), [batch])
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


def test_agreement_of_images_is_that_of_their_classes():
    from graphq.evaluate.compare import output_metrics

    reference = torch.zeros(1, 2, 3, 4)
    reference[:, 1] = 1.0
    assert output_metrics(reference, reference + 0.1 * torch.randn(1, 2, 3, 4)).agreement == 1.0
