"""Latencies: no model always runs behind the same one, and none behind itself."""

from collections import Counter
from itertools import pairwise

import torch
from torch import nn

import graphq
from graphq.evaluate import latency


def test_every_model_runs_behind_every_other_and_none_behind_itself(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(latency, "_runner", lambda path, runtime, feed: lambda: ran.append(path))
    found = latency.measure({name: name for name in "abcd"}, {}, rounds=60)
    assert [m.name for m in found] == list("abcd")
    pairs = Counter(pairwise(ran[8:]))
    assert len(ran) == 8 + 240 and len(pairs) == 12 and min(pairs.values()) > 5
    assert latency.measure({"a": "a"}, {}, rounds=3)[0].speedup == 1


def test_files_are_timed_in_the_runtime(tmp_path):
    model, x = nn.Linear(8, 4), torch.randn(2, 8)
    path = graphq.export(graphq.capture(model, (x,)), tmp_path / "m.onnx")
    first, second = latency.measure({"one": path, "two": path}, {"input": x.numpy()}, rounds=5)
    assert 0 < first.min_ms <= first.median_ms and second.name == "two" and first.speedup == 1
