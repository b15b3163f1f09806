"""Each canonical rewrite changes what it names, and nothing about the result."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphq
from graphq.graph.view import layers
from graphq.passes.canonical import canonical_pipeline


def canonical(module, *args):
    """(families after the pipeline, largest relative difference of the results)."""
    module.eval()
    gm = graphq.capture(module, args, dynamic_shapes=None)
    canonical_pipeline()(gm)
    with torch.no_grad():
        want, got = module(*args), gm(*args)
    error = ((want - got).abs().max() / want.abs().max().clamp(min=1e-6)).item()
    return [v.family for v in layers(gm)], error


class Lambda(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *x):
        return self.function(self, *x)


def trained(norm):
    """A batch norm with statistics that matter."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    return norm


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@settings(max_examples=25, deadline=None)
@given(
    dims=st.sampled_from([1, 2, 3]),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    stride=st.sampled_from([1, 2]),
    seed=st.integers(0, 9),
)
def test_batch_norm_folds_into_every_convolution(dims, transposed, groups, bias, stride, seed):
    torch.manual_seed(seed)
    make = (TRANSPOSED if transposed else CONV)[dims]
    conv = make(4, 6, 3, stride=stride, groups=groups, bias=bias, padding=1)
    families, error = canonical(nn.Sequential(conv, trained(NORM[dims](6))), torch.randn(2, 4, *[6] * dims))
    assert families == ["conv_transpose" if transposed else "conv"]
    assert error < 1e-4


def test_batch_norm_folds_into_linear():
    families, error = canonical(nn.Sequential(nn.Linear(5, 7), trained(nn.BatchNorm1d(7))), torch.randn(4, 5))
    assert (families, error < 1e-4) == (["linear"], True)


@pytest.mark.parametrize("groups", [1, 2])
def test_batch_norm_folds_forward_into_a_convolution_without_padding(groups):
    net = nn.Sequential(trained(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, groups=groups))
    families, error = canonical(net, torch.randn(2, 4, 6, 6))
    assert (families, error < 1e-4) == (["conv"], True)


def test_batch_norm_does_not_fold_forward_over_padding():
    net = nn.Sequential(trained(nn.BatchNorm2d(4)), nn.Conv2d(4, 6, 3, padding=1))
    families, error = canonical(net, torch.randn(2, 4, 6, 6))
    assert (families, error < 1e-5) == (["batch_norm", "conv"], True)


def test_batch_norm_after_a_concatenation_folds_into_all_branches():
    def forward(m, x):
        return m.norm(torch.cat([m.a(x), m.b(x)], 1))

    net = Lambda(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 2, 3, padding=1), norm=trained(nn.BatchNorm2d(6)))
    families, error = canonical(net, torch.randn(2, 3, 5, 5))
    assert (sorted(families), error < 1e-4) == (["cat", "conv", "conv"], True)


def test_batch_norm_after_a_split_folds_into_its_rows():
    def forward(m, x):
        a, b = m.conv(x).split([4, 2], 1)
        return torch.cat([m.norm(a), b.relu()], 1)

    net = Lambda(forward, conv=nn.Conv2d(3, 6, 1), norm=trained(nn.BatchNorm2d(4)))
    families, error = canonical(net, torch.randn(2, 3, 5, 5))
    assert "batch_norm" not in families
    assert error < 1e-4


def test_a_batch_norm_whose_convolution_feeds_something_else_stays():
    def forward(m, x):
        y = m.conv(x)
        return m.norm(y) + y

    net = Lambda(forward, conv=nn.Conv2d(3, 4, 1), norm=trained(nn.BatchNorm2d(4)))
    families, error = canonical(net, torch.randn(2, 3, 5, 5))
    assert (families, error < 1e-5) == (["conv", "batch_norm", "add"], True)


W, B = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(7))
LINEAR_FORMS = {
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w.t()),
    "matmul of the transposed, plus bias": lambda m, x: x @ m.w.t() + m.b,
    "bias first": lambda m, x: m.b + torch.mm(x, m.w.transpose(0, 1)),
    "matmul of a parameter [in, out]": lambda m, x: torch.matmul(x, m.wt) + m.b,
    "linear": lambda m, x: F.linear(x, m.w, m.b),
}


@pytest.mark.parametrize("form", LINEAR_FORMS)
def test_every_way_to_write_a_linear_becomes_one(form):
    net = Lambda(LINEAR_FORMS[form])
    net.w, net.b, net.wt = W, B, nn.Parameter(W.detach().t().contiguous())
    families, error = canonical(net, torch.randn(3, 5))
    assert (families, error < 1e-6) == (["linear"], True)


@pytest.mark.parametrize(
    ("function", "family"),
    [
        (F.relu6, "clip"),
        (lambda x: x.clamp(-1, 2), "clip"),
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: x.clamp_min(0), "relu"),
        (lambda x: F.hardtanh(x, 0.0, math.inf), "relu"),
        (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu"),
        (lambda x: 0.5 * x * (1.0 + torch.erf(x * 0.7071067811865476)), "gelu"),
        (lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))), "gelu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: torch.exp(x - x.amax(-1, True)) / torch.exp(x - x.amax(-1, True)).sum(-1, True), None),
        (lambda x: (lambda e: e / e.sum(-1, True))(torch.exp(x - x.amax(-1, True))), "softmax"),
    ],
)
def test_decomposed_activations_are_recognized(function, family):
    families, error = canonical(Lambda(lambda m, x: function(x)), torch.randn(3, 6) * 3)
    assert error < 1e-5
    if family is not None:
        assert families == [family]


def test_decomposed_norms_are_recognized():
    gamma, beta = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def layer_norm(m, x):
        d = x - x.mean(-1, keepdim=True)
        return d / torch.sqrt((d * d).mean(-1, keepdim=True) + 1e-5) * m.gamma + m.beta

    def rms_norm(m, x):
        return m.gamma * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    for function, family in ((layer_norm, "layer_norm"), (rms_norm, "rms_norm")):
        net = Lambda(function)
        net.gamma, net.beta = gamma, beta
        families, error = canonical(net, torch.randn(3, 4, 6))
        assert (families, error < 1e-5) == ([family], True)


def test_zero_padding_folds_into_the_convolution_and_other_padding_does_not():
    def padded(mode, widths, value=0.0):
        return Lambda(lambda m, x: m.conv(F.pad(x, widths, mode, value)), conv=nn.Conv2d(3, 4, 3, padding=1))

    x = torch.randn(2, 3, 6, 6)
    assert canonical(padded("constant", [1, 1, 2, 2]), x)[0] == ["conv"]
    assert canonical(padded("constant", [1, 1, 2, 2]), x)[1] < 1e-6
    assert canonical(padded("constant", [0, 1, 0, 1]), x)[0] == ["pad", "conv"]
    assert canonical(padded("constant", [1, 1, 1, 1], 0.5), x)[0] == ["pad", "conv"]


def test_the_global_mean_becomes_global_pooling():
    for keepdim in (True, False):
        families, error = canonical(Lambda(lambda m, x, k=keepdim: x.mean((2, 3), k)), torch.randn(2, 3, 5, 5))
        assert families[0] == "adaptive_avg_pool"
        assert error < 1e-5


def test_noops_are_dropped():
    def forward(m, x):
        y = m.drop(x.contiguous().clone()).to(torch.float32).view(2, 6)[:, :]
        return y.expand(2, 6).detach() + 0

    families, error = canonical(Lambda(forward, drop=nn.Dropout(0.3)), torch.randn(2, 6))
    assert (families, error) == (["add"], 0.0)


def test_same_padding_becomes_numbers():
    families, error = canonical(nn.Conv2d(3, 4, 3, padding="same", dilation=2), torch.randn(2, 3, 7, 7))
    assert (families, error < 1e-6) == (["conv"], True)


class Attends(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        x = x[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=self.mask(x))


FULL = {
    "compared": lambda x: (torch.arange(5) + 0 >= 0)[None, None, None].expand(x.shape[0], -1, 5, -1),
    "added": lambda x: torch.zeros(5, 5),
}
HIDING = {
    "one": lambda x: (torch.arange(5) >= 1)[None, None, None].expand(x.shape[0], -1, 5, -1),
    "computed": lambda x: (x > -100).any(-1)[:, :, None].expand(-1, -1, 5, -1),
    "causal": lambda x: torch.ones(5, 5).tril().bool(),
}


@pytest.mark.parametrize("name", [*FULL, *HIDING])
def test_masks_that_hide_nothing_whatever_the_input_are_dropped(name):
    model, x = Attends({**FULL, **HIDING}[name]).eval(), torch.randn(3, 5, 8)
    gm = graphq.capture(model, (x,), dynamic_shapes="batch")
    canonical_pipeline()(gm)
    [view] = [v for v in layers(gm) if v.family == "attention"]
    assert (view.arg("attn_mask") is None) == (name in FULL)
    assert torch.allclose(gm(x[:2]), model(x[:2]), atol=1e-6)
