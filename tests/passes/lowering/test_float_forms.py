"""Float ops are written as ONNX Runtime's CPU computes them fast, and mean what they meant."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import graphq
from graphq.evaluate.taps import optimized_model

MASKS = {
    "bool": torch.tensor([[True, True, False, True, False], [False] * 5])[:, None, None].expand(2, 1, 5, 5),
    "float": torch.tensor([[0.0, -torch.inf, 0.0, 1.5, 0.0], [-torch.inf] * 5])[:, None, None].expand(2, 1, 5, 5),
    "both": torch.tensor([[torch.finfo().min, -torch.inf, torch.finfo().min, -torch.inf, -torch.inf], [0.0] * 5])[
        :, None, None
    ].expand(2, 1, 5, 5),
    "lowest": torch.tensor([[0.0, torch.finfo().min, 0.0, 0.0, 0.0], [0.0] * 5])[:, None, None].expand(2, 1, 5, 5),
}


class Block(nn.Module):
    def __init__(self, scale=None):
        super().__init__()
        self.qkv, self.out, self.norm, self.scale = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8), scale

    def forward(self, x, mask):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        return self.norm(x + self.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
@pytest.mark.parametrize("kind", MASKS)
def test_attention_with_a_mask_is_written_out_without_a_test_for_nan(kind, form, tmp_path):
    torch.manual_seed(0)
    model, mask = Block(scale=0.3 if kind == "bool" else None).eval(), MASKS[kind].clone()
    data = [(torch.randn(2, 5, 8), mask) for _ in range(3)]
    place = graphq.get_target("onnxruntime", form=form)
    quantized = graphq.quantize(model, "int8", data, target=place, dynamic_shapes="batch", progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    ops = [n.op_type for n in optimized_model(path).graph.node]
    assert "IsNaN" not in ops and "SkipLayerNormalization" not in ops and "LayerNormalization" in ops
    assert graphq.verify(quantized, path, data).agrees
    run = onnxruntime.InferenceSession(path)
    inputs = dict(zip([i.name for i in run.get_inputs()], [t.numpy() for t in data[0]], strict=True))
    found = run.run(None, inputs)[0]
    assert np.isfinite(found).all()
    assert np.abs(found - quantized(*data[0]).detach().numpy()).max() < 0.02  # a step of int8


def test_sums_in_front_of_other_ops_stay_sums_of_two(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(torch.tanh(x + self.a(x)) + 1.0) + torch.add(x, x, alpha=2)

    data = [torch.randn(2, 8) for _ in range(2)]
    quantized = graphq.quantize(Model().eval(), "int8", data, progress=False)
    path = graphq.export(quantized, tmp_path / "m.onnx")
    assert not [n for n in optimized_model(path).graph.node if n.op_type == "Sum"]
    assert graphq.verify(quantized, path, data).agrees
