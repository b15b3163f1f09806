"""Mistakes that users make: each ends in a one-screen error with place and remedy, and leaves nothing behind."""

import errno
import os
import sys

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, Rule
from graphq.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    ExportError,
    GraphqError,
    RuntimeMismatch,
    StateError,
)

X = torch.randn(2, 4)


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def prepared():
    return graphq.prepare(net(), "int8", (X,))


class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def corrupted(folder):
    gm = graphq.quantize(net(), "int8", [X], progress=False)
    path = graphq.export(gm, folder / "model.onnx")
    path.write_bytes(path.read_bytes()[:200])
    graphq.verify(gm, path, [X])


MISTAKES = {
    "a typo in a preset": (lambda d: graphq.prepare(net(), "int9", (X,)), ConfigError, "int8"),
    "a selector that matches nothing": (
        lambda d: graphq.prepare(
            net(), QuantConfig(rules=(Rule(select="*", scheme="int8"), Rule(select="nn.Lineer"))), (X,)
        ),
        ConfigError,
        "Linear",
    ),
    "an empty loader": (lambda d: graphq.calibrate(prepared(), []), CalibrationError, "iterable"),
    "a batch of the wrong shape": (
        lambda d: graphq.calibrate(prepared(), [torch.randn(2, 5)]),
        CalibrationError,
        "[*, 4]",
    ),
    "NaN activations": (
        lambda d: graphq.calibrate(prepared(), [X, torch.full((2, 4), torch.nan)], progress=False),
        CalibrationError,
        "input input",
    ),
    "control flow that depends on data": (
        lambda d: graphq.prepare(Branch(), "int8", (X,)),
        CaptureError,
        "torch.where",
    ),
    "a path that cannot be written": (
        lambda d: graphq.export(graphq.quantize(net(), "int8", [X], progress=False), d / "missing" / "model.onnx"),
        ExportError,
        "missing",
    ),
    "preparing twice": (lambda d: graphq.prepare(prepared(), "int8", (X,)), StateError, "float model"),
    "exporting before converting": (lambda d: graphq.export(prepared(), d / "m.onnx"), StateError, "graphq.convert"),
    "an unknown target": (lambda d: graphq.prepare(net(), "int8", (X,), target="onnxrt"), ConfigError, "onnxruntime"),
    "a corrupted file to verify": (corrupted, RuntimeMismatch, "Export it again"),
    "converting before calibrating": (lambda d: graphq.convert(prepared()), StateError, "graphq.calibrate"),
    "labels in the batches": (lambda d: graphq.calibrate(prepared(), [(X, X)]), CalibrationError, "labels"),
    "a tensor instead of batches": (lambda d: graphq.calibrate(prepared(), X), CalibrationError, "iterable"),
    "a file name that is no ONNX": (
        lambda d: graphq.export(graphq.quantize(net(), "int8", [X], progress=False), d / "model.pt"),
        ExportError,
        "model.onnx",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake(name, tmp_path):
    make, kind, hint = MISTAKES[name]
    with pytest.raises(kind) as e:
        make(tmp_path)
    text = str(e.value)
    assert isinstance(e.value, GraphqError)
    assert hint in text
    assert e.value.remedy or e.value.where
    assert len(text.splitlines()) <= 6 and len(text) < 1000
    assert [f.name for f in tmp_path.iterdir()] in ([], ["model.onnx"])


def test_a_full_disk_leaves_neither_a_part_nor_a_damaged_file(tmp_path, monkeypatch):
    gm = graphq.quantize(net(), "int8", [X], progress=False)
    path = graphq.export(gm, tmp_path / "model.onnx")
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys.modules["graphq.export.onnx"].ir, "save", full)
    with pytest.raises(ExportError, match="No space left") as e:
        graphq.export(gm, path)
    assert str(path) in e.value.where
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == before


def test_failed_calibration_leaves_a_prepared_graph_that_can_be_calibrated():
    gm = prepared()
    with pytest.raises(CalibrationError):
        graphq.calibrate(gm, [X, torch.full((2, 4), torch.nan)], progress=False)
    want = gm(X)
    graphq.calibrate(gm, [X], progress=False)
    assert not torch.equal(gm(X), want)
    assert graphq.convert(gm) is not None
