"""Products by oneDNN are products, whatever way their matrices lie in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphq.numerics import products
from graphq.numerics.products import add_moments, linear, matmul, mirrored

LAYOUTS = {
    "as it is": lambda m: m,
    "transposed": lambda m: m.T.contiguous().T,
    "part of a larger one": lambda m: torch.nn.functional.pad(m, (3, 5, 2, 1))[2:-1, 3:-5],
    "transposed part": lambda m: torch.nn.functional.pad(m.T, (3, 5, 2, 1))[2:-1, 3:-5].T,
}


def wanted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().transpose(-1, -2)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_a_linear_is_the_float64_product_for_every_layout(first: str, second: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(96, 130), torch.randn(70, 130), torch.randn(70)
    found = linear(LAYOUTS[first](x), LAYOUTS[second](weight), bias)
    torch.testing.assert_close(found.double(), wanted(x, weight) + bias, rtol=0, atol=2e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 200), st.integers(1, 200), st.integers(1, 200), st.integers(0, 3), st.sampled_from(sorted(LAYOUTS))
)
def test_products_of_every_size_are_the_float64_products(m: int, k: int, n: int, batch: int, layout: str) -> None:
    a, b = torch.randn(max(1, batch), m, k), LAYOUTS[layout](torch.randn(k, n)).expand(max(1, batch), k, n)
    if batch == 0:
        a, b = a[0], b[0]
    torch.testing.assert_close(matmul(a, b).double(), a.double() @ b.double(), rtol=0, atol=3e-4)


@pytest.mark.parametrize("groups, width", [(1, 7), (1, 200), (1, 401), (3, 90)])
def test_moments_are_sums_of_outer_products(groups: int, width: int) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(groups, n, width) for n in (130, 1, 65)]
    total = torch.zeros(groups, width, width)
    for rows in batches:
        add_moments(total, rows)
    found, every = mirrored(total), torch.cat(batches, 1).double()
    assert torch.equal(found, found.transpose(1, 2))
    torch.testing.assert_close(found.double(), every.transpose(1, 2) @ every, rtol=0, atol=5e-4)


def test_on_avx512_large_products_go_to_onednn_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("wants a CPU with AVX-512")
    with torch.profiler.profile() as profile:
        linear(torch.randn(256, 256), torch.randn(256, 256))
        assert linear(torch.randn(4, 256), torch.randn(256, 256)).shape == (4, 256)
    assert [e.count for e in profile.key_averages() if e.key == "mkldnn::_linear_pointwise"] == [1]


@pytest.mark.parametrize("shape", [(3, 70, 130), (200, 130)])
def test_gradients_are_those_of_torch(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(*s, requires_grad=True) for s in (shape, (90, 130), (90,))]
    found, wanted = (
        torch.autograd.grad(f(*tensors).square().sum(), tensors) for f in (linear, torch.nn.functional.linear)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_without_avx512_torch_computes_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    x, weight = torch.randn(256, 256), torch.randn(256, 256)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight))
