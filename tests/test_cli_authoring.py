"""The workbench of pass authors, from the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import zoo
from graphq.cli import app
from graphq.errors import PassError

RULE = """
from graphq.authoring import QuantPattern, Rewrite

class ConvScaleRelu(Rewrite):
    '''conv ── · 2 ── relu'''

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.relu(op.once(op.conv(x, op.param(weight), bias, [1, 1])) * 2.0)
"""

MODELS = """
import torch
from torch import nn
from torch.nn import functional as F

class Planted(nn.Module):
    def __init__(self, function, stride=1):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 3, 3, stride=stride, padding=1), function

    def forward(self, x):
        return self.function(self, x)

def escaping(m, x):
    y = m.conv(x)
    return F.relu(y * 2.0), y.sigmoid()

fits = lambda: Planted(lambda m, x: F.relu(m.conv(x) * 2.0))
wrong_stride = lambda: Planted(lambda m, x: F.relu(m.conv(x) * 2.0), stride=2)
wrong_number = lambda: Planted(lambda m, x: F.relu(m.conv(x) * 2.5))
computed_weight = lambda: Planted(lambda m, x: F.relu(F.conv2d(x, m.conv.weight.abs()) * 2.0))
another_reader = lambda: Planted(escaping)
another_op = lambda: Planted(lambda m, x: F.gelu(m.conv(x) * 2.0))
data = lambda: [torch.randn(2, 3, 6, 6)]
"""

OBSTACLES = {
    "wrong_stride": ("stride", "asks for 1"),
    "wrong_number": ("2.5", "asks for 2.0"),
    "computed_weight": ("weight", "asks for a parameter"),
    "another_reader": ("also read by sigmoid",),
    "another_op": ("read by gelu", "asks for relu"),
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rule.py").write_text(RULE)
    (tmp_path / "planted_models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("planted_models", None)
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


def match(run, model, *words):
    return run("match", "rule.py", "--model", f"planted_models:{model}", "--calibration", "planted_models:data", *words)


def test_match_lists_matches_with_ops_and_times(run):
    (found,) = json.loads(match(run, "fits", "--json").stdout)
    assert found["rule"] == "ConvScaleRelu" and found["near_misses"] == [] and found["milliseconds"] > 0
    assert found["matches"][0]["ops"] == ["relu", "mul", "conv2d"]
    assert "ConvScaleRelu matches" in match(run, "fits").stdout


@pytest.mark.parametrize("model", OBSTACLES)
def test_match_names_the_true_obstacle_first(run, model):
    (found,) = json.loads(match(run, model, "--json").stdout)
    assert found["matches"] == []
    for word in OBSTACLES[model]:
        assert word in found["near_misses"][0]["reason"]


def test_match_without_an_example_or_a_rule_says_what_is_missing(run, tmp_path):
    with pytest.raises(Exception, match="--calibration"):
        run("match", "rule.py", "--model", "planted_models:fits")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(PassError, match="no rule"):
        run("match", "empty.py", "--model", "planted_models:fits", "--calibration", "planted_models:data")


def test_passes_lists_every_rule_with_what_it_does(run):
    rows = json.loads(run("passes", "--json").stdout)
    by_rule = {r["rule"]: r for r in rows}
    assert by_rule["FoldBatchNormIntoConv"]["drawing"] == "x ── conv ── batch_norm ── y ⇒ x ── conv' ── y."
    assert by_rule["FoldBatchNormIntoConv"]["promise"] == "ulp"
    assert list(dict.fromkeys(r["runs"] for r in rows)) == [
        "canonicalize", "annotate", "prepare", "calibrate", "convert", "export", "verify",
    ]  # fmt: skip
    assert all(r["drawing"] for r in rows)


def test_trace_writes_a_diff_for_every_pass_and_one_page_on_its_own(run, tmp_path):
    np.savez("data.npz", zoo.photo_crops(2, seed=0).numpy())
    out = tmp_path / "trace"
    result = run("trace", "zoo:efficientnet_lite0", "--calibration", "data.npz", "--passes", "--out", out)
    assert "wrote" in result.stdout
    [file] = out.glob("*-fold_batchnorm.diff")
    diff = file.read_text()
    assert "- batch_norm = batch_norm(conv2d" in diff and "_conv_stem" in diff
    page = (out / "index.html").read_text()
    assert page.count("<section>") == len(list(out.glob("*.diff"))) > 10
    assert "<svg" in page and 'class="gone"' in page and 'class="come"' in page
    assert "http://" not in page and "https://" not in page and "src=" not in page


def test_new_pass_writes_a_rule_whose_test_passes(run, tmp_path):
    assert "wrote" in run("new-pass", "drop_double_relu").stdout
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "test_drop_double_relu.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "2 passed" in done.stdout, done.stdout
    with pytest.raises(PassError, match="exists already"):
        run("new-pass", "drop_double_relu")
    with pytest.raises(PassError, match="no module name"):
        run("new-pass", "Drop-It")
