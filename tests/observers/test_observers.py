"""Observers find the range that their definition names, however the data comes, in bounded memory."""

import math
import weakref

import numpy as np
import pytest
import torch

from graphq.config import QuantSpec
from graphq.errors import CalibrationError, ConfigError
from graphq.numerics.affine import fake_quantize
from graphq.numerics.scales import choose_qparams
from graphq.observers import OBSERVERS, make_observer
from graphq.observers.histogram import BINS, FLUSH, Histogram

SYMMETRIC = QuantSpec(format="int8", symmetric=True)
AFFINE = QuantSpec(format="uint8", symmetric=False)
NAMES = ["minmax", "moving_average", "percentile", "mse", "entropy"]


def spec(name, symmetric):
    return (SYMMETRIC if symmetric else AFFINE).model_copy(update={"observer": name})


def ranges(name, symmetric, *batches, **options):
    observer = make_observer(spec(name, symmetric).model_copy(update={"observer_args": options}), ())
    for b in batches:
        observer.update(b)
    return tuple(v.item() for v in observer.range())


def test_minmax_is_the_extremes_with_zero_included():
    assert ranges("minmax", False, torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0])) == (0.0, 5.0)


def test_a_fixed_range_is_what_it_is_whatever_the_data():
    assert ranges("fixed", False, torch.tensor([3.0]), lo=-1.0, hi=2.0) == (-1.0, 2.0)
    for lo, hi in ((0.0, 0.0), (1.0, 2.0)):
        with pytest.raises(ConfigError, match="range around zero"):
            ranges("fixed", False, lo=lo, hi=hi)


def test_moving_average_follows_its_formula():
    lo, hi = ranges("moving_average", False, torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 5.0]), rate=0.25)
    assert (lo, hi) == pytest.approx((-1.5, 2.0))


@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_is_numpys_to_within_a_bin(symmetric):
    x = torch.randn(100_000)
    lo, hi = ranges("percentile", symmetric, x, percentile=99.0)
    width = 2.0 ** math.ceil(math.log2(x.abs().max().item())) * 2 / BINS
    if symmetric:
        assert hi == pytest.approx(np.percentile(x.abs().numpy(), 99), abs=2 * width)
        assert lo == -hi
    else:
        assert hi == pytest.approx(np.percentile(x.numpy(), 99.5), abs=2 * width)
        assert lo == pytest.approx(np.percentile(x.numpy(), 0.5), abs=2 * width)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_no_worse_than_a_brute_force_search(symmetric):
    x = torch.cat([torch.randn(4000), torch.tensor([25.0])])
    s = spec("mse", symmetric).model_copy(update={"format": "int4" if symmetric else "uint4"})

    def error(lo, hi):
        scale, zero = choose_qparams(torch.tensor(lo), torch.tensor(hi), s.number_format, symmetric=symmetric)
        return (fake_quantize(x, scale, zero, (), s.number_format) - x).square().sum().item()

    observer = make_observer(s, ())
    observer.update(x)
    found = error(*(v.item() for v in observer.range()))
    low = x.min().item()
    best = min(error(low * a, 25.0 * b) for a in np.linspace(0.5, 1, 12) for b in np.linspace(0.1, 1, 60))
    assert found <= 1.1 * best
    assert found < 0.7 * error(low, 25.0)


def test_entropy_clips_a_long_tail_but_keeps_a_uniform_range():
    gauss = torch.cat([torch.randn(50_000), torch.tensor([60.0])])
    assert ranges("entropy", True, gauss)[1] < 30
    assert ranges("entropy", True, torch.linspace(-1, 1, 50_000))[1] > 0.95


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_relu_output_gets_a_range_from_zero(name, symmetric):
    lo, hi = ranges(name, symmetric, torch.randn(20_000).relu())
    assert hi > 1.0
    assert -hi <= lo <= 0.0 if symmetric else lo == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_mask_values_do_not_stretch_the_range(name):
    x = torch.randn(5000)
    masked = torch.cat([x, torch.full((50,), -math.inf), torch.full((50,), torch.finfo(torch.float32).min)])
    lo, hi = ranges(name, False, masked)
    assert lo >= x.min().item() - 0.1
    assert hi <= x.max().item() + 0.1


@pytest.mark.parametrize("name", NAMES)
def test_nan_and_plus_infinity_are_errors(name):
    for bad in (math.nan, math.inf):
        with pytest.raises(CalibrationError):
            ranges(name, False, torch.tensor([1.0, bad]))


@pytest.mark.parametrize("name", NAMES)
def test_constants_and_dead_tensors_are_fine(name):
    assert ranges(name, False, torch.zeros(100)) == (0.0, 0.0)
    lo, hi = ranges(name, False, torch.full((100,), 3.0))
    assert lo == 0.0
    assert hi == pytest.approx(3.0, rel=0.75)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "moving_average"])
def test_merging_two_observers_equals_one_that_saw_all(name):
    parts = [torch.randn(3000), torch.randn(3000) * 7, torch.randn(100) * 0.1]
    observers = [make_observer(spec(name, False), ()) for _ in parts]
    for o, p in zip(observers, parts, strict=True):
        o.update(p)
    whole = make_observer(spec(name, False), ())
    for p in parts:
        whole.update(p)
    observers[0].merge(observers[1])
    observers[2].merge(observers[0])
    assert [v.item() for v in observers[2].range()] == [v.item() for v in whole.range()]


def test_the_histogram_stays_small_and_does_not_keep_tensors_alive():
    h = Histogram((), sample=5000)
    alive = []
    for _ in range(40):
        x = torch.randn(200_000)
        alive.append(weakref.ref(x.untyped_storage()))
        h.add(x)
    del x
    assert not any(ref() for ref in alive)
    assert h._buffer.numel() == FLUSH
    assert h.filled().shape == (1, BINS)


def test_the_order_of_the_data_does_not_matter():
    small, large = torch.randn(1000), torch.randn(1000) * 1000
    a, b = Histogram(()), Histogram(())
    a.add(small), a.add(large)
    b.add(large), b.add(small)
    near = (a.filled() - b.filled()).abs().sum().item()
    assert near <= 2  # values on an edge of a bin may round to either side
    assert a.filled().sum() == b.filled().sum() == 2000


def test_per_channel_ranges_come_in_the_shape_of_the_scale():
    x = torch.randn(6, 40) * torch.arange(1, 7)[:, None]
    for name in ("minmax", "mse", "percentile"):
        observer = make_observer(QuantSpec(observer=name, granularity="channel"), (1, -1))
        observer.update(x)
        lo, hi = observer.range()
        assert lo.shape == hi.shape == (6, 1)
        assert (hi.flatten() <= x.abs().amax(1) * 1.001).all()


def test_unknown_observers_and_options_are_errors_with_suggestions():
    with pytest.raises(ConfigError, match="'percentile'"):
        OBSERVERS["percentil"]
    with pytest.raises(ConfigError, match="shrink"):
        make_observer(QuantSpec(observer="mse", observer_args={"shrink": 2}), ())


def heavy(batches=4):
    """Gaussian, with outliers far out that are a fiftieth of a percent of the data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batches, 50_000, generator=generator)
    x[:, :5] = torch.tensor([40.0, -38.0, 41.0, -42.0, 39.0])
    return x.unbind()


def squared_error(name, symmetric, data, **options):
    fields = {"format": "int4", "observer": name, "observer_args": options, "symmetric": symmetric}
    s = QuantSpec(**fields)
    observer = make_observer(s, ())
    for x in data:
        observer.update(x)
    scale, zero = choose_qparams(*observer.range(), s.number_format, symmetric=symmetric)
    return sum((fake_quantize(x, scale, zero, (), s.number_format) - x).double().square().sum().item() for x in data)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_with_outliers_percentile_mse_and_entropy_beat_minmax(symmetric, shift):
    data = [x + shift for x in heavy()]
    plain = squared_error("minmax", symmetric, data)
    for name, options in (("percentile", {"percentile": 99.9}), ("mse", {}), ("entropy", {})):
        assert squared_error(name, symmetric, data, **options) < 0.8 * plain, name


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_merging_shards_equals_one_pass_over_all(name, symmetric):
    data = heavy(8)
    whole, shards = (
        make_observer(spec(name, symmetric), ()),
        [make_observer(spec(name, symmetric), ()) for _ in range(4)],
    )
    for number, x in enumerate(data):
        whole.update(x)
        shards[number // 2].update(x)
    for other in shards[1:]:
        shards[0].merge(other)
    assert [v.item() for v in shards[0].range()] == [v.item() for v in whole.range()]


def held(observer):
    """Bytes of all tensors that an observer keeps, measured."""
    return sum(v.nbytes for o in (observer, getattr(observer, "histogram", None)) if o is not None
               for v in vars(o).values() if isinstance(v, torch.Tensor))  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(OBSERVERS.names()) - {"imatrix_mse", "fixed"}))
def test_memory_does_not_grow_with_the_number_of_batches(name):
    observer = make_observer(spec(name, False), ())
    observer.update(torch.randn(100_000))
    observer.range()
    after_one = held(observer)
    for _ in range(30):
        observer.update(torch.randn(100_000))
    observer.range()
    assert held(observer) == after_one < 400_000


@pytest.mark.parametrize("name", sorted(set(OBSERVERS.names()) - {"imatrix_mse", "fixed"}))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_seen_as_it_is(name, dtype):
    x = (torch.randn(20_000) * 3).to(dtype)
    ends = []
    for data in (x, x.float()):
        observer = make_observer(spec(name, False), ())
        observer.update(data)
        ends.append([v.item() for v in observer.range()])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("block", [(), (1, -1), (1, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_grid_finds_the_best_of_its_ranges_in_every_block(block, symmetric):
    torch.manual_seed(0)
    x = torch.randn(3, 32)
    x[:, ::16] *= 8
    s = QuantSpec(format="int4", symmetric=symmetric, observer="mse_grid")
    observer = make_observer(s.model_copy(update={"observer_args": {"shrink": 0.9, "patience": 1000}}), block)
    observer.update(x)
    hi = observer.range()[1]
    parts = [x.reshape(1, -1), x, x.reshape(6, 16)][[(), (1, -1), (1, 16)].index(block)]
    for row, found in zip(parts, hi.reshape(-1), strict=True):
        a, b = row.min().clamp(max=0), row.max().clamp(min=0)

        def loss(p, row=row, a=a, b=b):
            scale, zero = choose_qparams(a * p, b * p, s.number_format, symmetric=symmetric)
            return (fake_quantize(row, scale, zero, (), s.number_format) - row).abs().pow(2.4).sum().item()

        best = min((1 - i / 100 for i in range(90)), key=loss)
        assert found.item() == pytest.approx(best * b.item(), rel=1e-5)
