"""Small batches of images run together; everything else runs as it was given."""

import collections
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import graphq
from graphq.calibration import runner
from graphq.calibration.batches import batches_of
from graphq.calibration.runner import resident, run_calibration
from graphq.quantizer import quantizers


def sizes_seen(model, args, data, dynamic="batch", **options):
    gm = graphq.prepare(model, "int8", args, dynamic_shapes=dynamic)
    seen = []
    gm.register_forward_pre_hook(lambda m, a: seen.append(len(a[0])))
    assert run_calibration(gm, data, progress=False, **options) == len(data)
    return seen


def images(*sizes, side=8):
    return [torch.randn(n, 3, side, side) for n in sizes]


CONV = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def test_images_one_by_one_run_four_at_a_time():
    assert sizes_seen(CONV, (images(2)[0],), images(*[1] * 10)) == [4, 4, 2]


def test_large_batches_run_as_they_are():
    assert sizes_seen(CONV, (images(2)[0],), images(8, 8, 3, 1)) == [8, 8, 4]


def test_other_shapes_run_apart():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1))
    free = {"input": {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    data = [*images(1, 1), *images(1, side=12), *images(1)]
    assert sizes_seen(model, (images(2)[0],), data, free) == [2, 1, 1]


def test_a_static_batch_runs_as_it_is():
    assert sizes_seen(CONV, (images(1)[0],), images(1, 1), None) == [1, 1]


def test_sequences_run_as_they_are():
    assert sizes_seen(nn.Linear(4, 4), (torch.randn(2, 4),), [torch.randn(1, 4)] * 3) == [1, 1, 1]


@pytest.mark.parametrize("observer", ["minmax", "moving_average"])
def test_ranges_are_those_of_the_batches_as_given(observer):
    """Extremes are the same either way; a moving average, which counts batches, sees each of them."""
    spec = graphq.QuantSpec(format="uint8", symmetric=False, observer=observer)
    rule = graphq.Rule(select="*", scheme=graphq.Scheme(weight=graphq.presets.WEIGHT_INT8, input=spec))
    data = images(*[1] * 8)
    scales = []
    for dynamic, example in (("batch", images(2)), (None, images(1))):
        gm = graphq.prepare(CONV, graphq.QuantConfig(rules=(rule,)), tuple(example), dynamic_shapes=dynamic)
        graphq.calibrate(gm, data, progress=False)
        scales.append({k: q.scale for k, q in quantizers(gm).items()})
    for name, scale in scales[0].items():
        torch.testing.assert_close(scale, scales[1][name])


def test_batches_of_any_kind_of_mapping_go_to_the_device():
    batch = collections.UserDict(x=torch.ones(2), name="a")
    (args, kwargs), *_ = batches_of([batch], torch.device("meta"))
    assert args == () and kwargs["x"].device.type == "meta" and kwargs["name"] == "a"


def test_the_bar_says_how_far_it_is_how_long_it_takes_and_what_memory_is_held(monkeypatch):
    assert 1e8 < resident() < 1e11
    task = SimpleNamespace(description="gptq")
    assert re.fullmatch(r"\d+\.\d GB", runner._Memory().render(task).plain)
    monkeypatch.setattr(runner, "device_memory", lambda: 2_500_000_000)
    assert runner._Memory().render(task).plain.endswith(" GB + 2.5 GB")
    assert list(runner.progress_of(range(3), "gptq", show=True)) == [0, 1, 2]
