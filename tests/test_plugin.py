"""A package with an op, a pattern and a target of its own: found once installed, gone once uninstalled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent.parent / "examples" / "plugin"

END_TO_END = """
import json, math, sys, tempfile, torch, graphq
from pathlib import Path
from acme_graphq.ops import GatedMLP
from acme_graphq.rules import SplitSwiGLU
from graphq.testing import prove, recipe

torch.manual_seed(0)
model = torch.nn.Sequential(GatedMLP(16, 32), GatedMLP(16, 24)).eval()
data = [torch.randn(2, 5, 16) for _ in range(8)]
with graphq.authoring.checking():
    quantized = graphq.quantize(model, "int8", data, target=graphq.get_target("acme", cpu=sys.argv[1]), progress=False)
rows = [r for r in graphq.explain(quantized).rows if r.op == "acme.swiglu"]
with tempfile.TemporaryDirectory() as folder:
    path = graphq.export(quantized, Path(folder) / "model.onnx")
    checked = graphq.verify(quantized, path, [torch.randn(3, 5, 16)])
    explanation = graphq.explain(quantized, path)

@recipe("swiglu", ranks=(2, 3))
def swiglu(g, targets, a):
    x = a.setdefault("x", g.value(g.base_shape()))
    a.setdefault("weight", g.weight([2 * g.integer(1, 3), g.shape(x)[-1]], a, "weight"))
    if "bias" not in a:
        a["bias"] = g.optional(g.shape(a["weight"])[:1], a, "bias")
    return targets[0]

print(json.dumps({
    "actions": [r.action for r in rows],
    "kernels": explanation.kernels(),
    "disagreements": len(explanation.disagreements),
    "exact": math.isinf(checked.kernels_sqnr) and checked.agrees,
    "same machine": graphq.get_target("onnxruntime").cpu == sys.argv[1],
    "sqnr": graphq.compare(model, quantized, data).sqnr,
    "proven": prove(SplitSwiGLU, examples=60).rewritten,
}))
"""


def python(*words, path=None):
    """Run Python, with one more folder of packages."""
    env = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env)


def listed(path=None):
    """(names of the targets, names of the rules that `graphq passes` lists)"""
    code = "from graphq.authoring import TARGETS; print(TARGETS.names())"
    rules = json.loads(python("-c", "from graphq.cli import main; main()", "passes", "--json", path=path).stdout)
    return python("-c", code, path=path).stdout, {r["rule"]: r["origin"] for r in rules}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder of its own: other tests run beside these, and must not see the package."""
    folder = tmp_path_factory.mktemp("site-packages")
    words = ("install", "--no-deps", "--no-build-isolation", "--target", str(folder), str(PLUGIN))
    done = python("-m", "pip", "--disable-pip-version-check", *words)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("cpu", ["vnni", "avx2"])
def test_the_op_of_a_package_runs_end_to_end(installed, cpu):
    run = python("-c", END_TO_END, cpu, path=installed)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["actions"] == ["quantize", "quantize"]
    assert result["kernels"]["MatMulIntegerToFloat"] == 4
    assert result["disagreements"] == 0
    assert result["exact"] or not result["same machine"]
    assert result["sqnr"] > 20
    assert result["proven"] > 0


def test_it_is_listed_while_it_is_installed_and_not_otherwise(installed):
    targets, rules = listed(installed)
    assert "acme" in targets
    assert rules["SwiGLU"] == "acme_graphq"
    targets, rules = listed()
    assert "acme" not in targets and "SwiGLU" not in rules
