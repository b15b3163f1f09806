"""Results say in print what they hold: a line per op, the output's figures first, whether the runtime agrees."""

import pytest
import torch
from torch import nn

import graphq
from graphq.evaluate.verify import TensorCheck, Verification


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    quantized = graphq.quantize(model, "int8", batches, progress=False)
    path = graphq.export(quantized, tmp_path_factory.mktemp("printed") / "model.onnx")
    return model, quantized, path, batches


def test_an_explanation_is_a_line_for_every_op_that_computes(made):
    _, quantized, path, _ = made
    explanation = graphq.explain(quantized, path)
    lines = str(explanation).splitlines()
    assert len(lines) == sum(r.action != "skip" for r in explanation.rows) == 4
    assert lines[0].startswith("0 (conv2d): quantize, QLinearConv: ") and lines[0].endswith("]")


def test_a_comparison_gives_the_outputs_figures_and_the_worst_op_first(made):
    model, quantized, _, batches = made
    comparison = graphq.compare(model, quantized, batches[:1])
    head, *ops = str(comparison).splitlines()
    assert head.startswith(f"output: SQNR {comparison.sqnr:.1f} dB, cosine 0.9")
    assert len(ops) == len(comparison.ops) and ops[0].endswith(f"{comparison.ops[0].sqnr:.1f} dB")


def test_a_verification_is_one_line_that_names_what_diverges(made):
    _, quantized, path, batches = made
    assert str(graphq.verify(quantized, path, batches[:1])).startswith("verified: 100.0000% of the codes of ")
    wrong = TensorCheck(name="conv2d", kernel="QLinearConv", elements=4, differ=1, largest=3)
    assert str(Verification(tensors=[wrong])).startswith("DIVERGES first at conv2d (QLinearConv, 3 LSB: ")
