"""Mistakes that users make: each ends in a one-screen error with place and remedy, and leaves nothing behind."""

import errno
import os
import sys

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    ExportError,
    GraphqError,
    RuntimeMismatch,
    StateError,
    TargetError,
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


class Scaled(nn.Module):
    def forward(self, x, scale=1.0):
        return torch.nn.functional.linear(x, torch.ones(3, 4)) * scale


def with_input(bias=None, **spec):
    scheme = Scheme(weight=QuantSpec(granularity="channel"), input=QuantSpec(**{"format": "uint8", **spec}), bias=bias)
    return QuantConfig(rules=(Rule(select="*", scheme=scheme),))


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
    "labels in the data that is traced with": (
        lambda d: graphq.quantize(net(), "int8", [(X, X)], progress=False),
        CaptureError,
        "labels",
    ),
    "a model in half precision": (
        lambda d: graphq.quantize(net().half(), "int8", [X.half()], progress=False),
        TargetError,
        "model.float()",
    ),
    "a constant that changes between batches": (
        lambda d: graphq.quantize(Scaled(), "int8", [{"x": X, "scale": 1.0}, {"x": X, "scale": 3.0}], progress=False),
        CalibrationError,
        "constant 1.0",
    ),
    "numpy arrays as batches": (
        lambda d: graphq.quantize(net(), "int8", [X.numpy()], progress=False),
        CaptureError,
        "torch.from_numpy",
    ),
    "int8 activations on x86": (
        lambda d: graphq.prepare(
            net(), with_input(format="int8"), (X,), target=graphq.get_target("onnxruntime", cpu="vnni")
        ),
        TargetError,
        "uint8",
    ),
    "a bias format without a kernel": (
        lambda d: graphq.prepare(net(), with_input(bias=QuantSpec(format="int8")), (X,)),
        TargetError,
        "Leave bias out",
    ),
    "a typo in the name of a scheme": (lambda d: Rule(select="*", scheme="int88"), ConfigError, "'int8'"),
    "a typo in a key of a spec": (lambda d: QuantSpec(formt="int8"), ConfigError, "'format'"),
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
