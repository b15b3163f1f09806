"""A package with an op, a pattern and a target of its own: found once installed, gone once uninstalled."""

import json
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


def python(*words, **options):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


def listed():
    """(names of the targets, names of the rules that `graphq passes` lists)"""
    code = "from graphq.authoring import TARGETS; print(TARGETS.names())"
    rules = json.loads(python("-c", "from graphq.cli import main; main()", "passes", "--json").stdout)
    return python("-c", code).stdout, {r["rule"]: r["origin"] for r in rules}


@pytest.fixture
def installed():
    pip = ("-m", "pip", "--disable-pip-version-check")
    done = python(*pip, "install", "--no-deps", "--no-build-isolation", str(PLUGIN))
    assert done.returncode == 0, done.stderr
    yield
    assert python(*pip, "uninstall", "-y", "acme-graphq").returncode == 0


@pytest.mark.parametrize("cpu", ["vnni", "avx2"])
def test_the_op_of_a_package_runs_end_to_end(installed, cpu):
    run = python("-c", END_TO_END, cpu)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["actions"] == ["quantize", "quantize"]
    assert result["kernels"]["MatMulIntegerToFloat"] == 4
    assert result["disagreements"] == 0
    assert result["exact"] or not result["same machine"]
    assert result["sqnr"] > 20
    assert result["proven"] > 0


def test_it_is_listed_while_it_is_installed_and_not_afterwards(request):
    before = listed()
    assert "acme" not in before[0] and "SwiGLU" not in before[1]
    request.getfixturevalue("installed")
    targets, rules = listed()
    assert "acme" in targets
    assert rules["SwiGLU"] == "acme_graphq"


def test_after_uninstalling_nothing_is_left():
    targets, rules = listed()
    assert "acme" not in targets and "SwiGLU" not in rules
