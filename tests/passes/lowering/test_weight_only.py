"""Packed weights run in ONNX Runtime as they were simulated: MatMulNBits and GatherBlockQuantized."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import TargetError
from graphq.numerics.packing import pack, unpack
from graphq.passes.targets import get_target


class Tied(nn.Module):
    """Rows of 96 values, a bias, no bias, and a table that is a weight too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 96)
        self.up, self.down = nn.Linear(96, 160), nn.Linear(160, 96, bias=False)
        self.head = nn.Linear(96, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.down(torch.relu(self.up(self.table(ids)))))


def config(spec):
    return QuantConfig(name="packed", rules=(Rule(select="linear | conv | embedding", scheme=Scheme(weight=spec)),))


def quantized(model, spec, example, level=4):
    target = get_target("onnxruntime", accuracy_level=level)
    return graphq.quantize(model, config(spec), [example], target=target, progress=False)


GROUP = {"granularity": "group"}
SPECS = {
    "int4 g32": QuantSpec(format="int4", group_size=32, **GROUP),
    "uint4 affine g16": QuantSpec(format="uint4", symmetric=False, group_size=16, **GROUP),
    "int3 g32": QuantSpec(format="int3", group_size=32, **GROUP),
    "int2 g16": QuantSpec(format="int2", group_size=16, **GROUP),
    "int8 channel": QuantSpec(granularity="channel"),
    "uint8 affine channel": QuantSpec(format="uint8", symmetric=False, granularity="channel"),
    "int8 tensor": QuantSpec(),
}


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("name", SPECS)
def test_the_runtime_computes_what_was_simulated(name, level, tmp_path):
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(0, 50, (2, 7))
    graph = quantized(model, SPECS[name], ids, level)
    path = graphq.export(graph, tmp_path / "m.onnx")
    explanation = graphq.explain(graph, path)
    assert not explanation.disagreements
    assert {"MatMulNBits": 3, "GatherBlockQuantized": 1}.items() <= explanation.kernels().items()
    result = graphq.verify(graph, path, [ids, torch.randint(0, 50, (3, 7))])
    assert result.agrees
    assert len(result.products) == 3
    assert min(p.sqnr for p in result.products) > 110
    by_weights = graph(ids)  # what the codes say, with float inputs
    simulated = graph.meta["graphq_target"].reference(graph)(ids)
    rounded = level == 4 and name != "int2 g16"  # ONNX Runtime rounds no inputs beside two bits in blocks of 16
    assert torch.allclose(by_weights, simulated, atol=1e-5) != rounded


def test_a_tied_table_is_stored_once(tmp_path):
    model, ids = Tied().eval(), torch.randint(0, 50, (2, 7))
    model.table = nn.Embedding(5000, 96)
    model.head = nn.Linear(96, 5000, bias=False)
    model.head.weight = model.table.weight
    path = graphq.export(quantized(model, SPECS["int4 g32"], ids), tmp_path / "m.onnx")
    assert path.stat().st_size < 1.2 * 5000 * 96 * (4 + 32 / 32) / 8
    large = [i for i in onnx.load(path).graph.initializer if np.prod(i.dims) >= 5000 * 48]
    assert len(large) == 1


def test_rows_that_do_not_fill_their_last_block(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Linear(100, 24).eval(), torch.randn(5, 100)
    spec = QuantSpec(format="uint4", symmetric=False, group_size=32, ragged=True, **GROUP)
    graph = quantized(model, spec, x)
    result = graphq.verify(graph, graphq.export(graph, tmp_path / "m.onnx"), [x])
    assert result.agrees
    assert len(result.products) == 1


@pytest.mark.parametrize(
    ("model", "example", "spec", "reason"),
    [
        (nn.Linear(48, 8), torch.randn(2, 48), QuantSpec(format="int4", group_size=24, **GROUP), "not 24"),
        (
            nn.Conv2d(32, 4, 1),
            torch.randn(1, 32, 4, 4),
            QuantSpec(format="int4", axis=1, group_size=16, **GROUP),
            "conv",
        ),
        (nn.Linear(32, 32), torch.randn(2, 32), QuantSpec(format="int4", granularity="block", block=(16, 16)), "rows"),
    ],
)
def test_what_has_no_packed_form_is_an_error_that_names_the_layer(model, example, spec, reason):
    with pytest.raises(TargetError, match=reason) as error:
        quantized(nn.Sequential(model).eval(), spec, example)
    assert "0, " in error.value.where


@given(bits=st.sampled_from([2, 4, 8]), rows=st.integers(1, 4), count=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_codes_come_back_from_their_bytes_lowest_bits_first(bits, rows, count, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count), dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    per = 8 // bits
    for r in range(rows):
        for b, byte in enumerate(packed[r].tolist()):
            wanted = sum(int(c) << (bits * i) for i, c in enumerate(codes[r, b * per : (b + 1) * per]))
            assert byte == wanted
    assert torch.equal(unpack(packed, bits, count), torch.from_numpy(codes))


def test_an_unknown_accuracy_level_is_refused():
    with pytest.raises(TargetError, match="accuracy_level"):
        get_target("onnxruntime", accuracy_level=1)
