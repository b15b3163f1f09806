"""Tokens of padding: what a mask leaves out changes neither biases nor ranges, whatever stands there."""

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.observers.tokens import counted, tokens_that_count
from graphq.quantizer import quantizers


class Encoder(nn.Module):
    """Attends to nothing, so that tokens do not see each other."""

    def __init__(self, flat):
        super().__init__()
        self.flat = flat
        self.table, self.first, self.second = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, input_ids, attention_mask):
        x = self.table(input_ids)
        y = self.first(x.flatten(0, 1) if self.flat else x).relu()
        if self.flat:  # as GPT-2 does: to and fro
            y = y.unflatten(0, x.shape[:2]).flatten(0, 1)
        return self.second(y).reshape(x.shape) * attention_mask[..., None]


def calibrated(filler, observer, correct, flat, *algorithms):
    torch.manual_seed(0)
    model = Encoder(flat).eval()
    model.table.weight.data[19] *= 50
    ids = torch.randint(0, 19, (4, 3, 8))
    mask = torch.ones_like(ids)
    mask[:, 0, 5:], mask[1, 1, 2:] = 0, 0
    data = [{"input_ids": torch.where(m > 0, i, filler), "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    weight = QuantSpec(format="int4", granularity="channel", observer=observer)
    inputs = QuantSpec(format="int8", observer="fixed", observer_args={"lo": -4, "hi": 4})
    scheme = Scheme(weight=weight, input=inputs if correct else None)
    config = QuantConfig(rules=(Rule(select="linear", scheme=scheme),), bias_correction=correct, algorithms=algorithms)
    graph = graphq.prepare(model, config, kwargs=data[0], target="simulation")
    graphq.calibrate(graph, data, progress=False)
    return {n: t for n, t in graph.named_buffers() if "corrected" in n} | {
        n: q.scale for n, q in quantizers(graph).items()
    }


@pytest.mark.parametrize("observer, correct", [("imatrix_mse", False), ("minmax", True)])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("algorithms", [(), ("awq", "gptq")])
def test_what_a_mask_leaves_out_does_not_count(observer, correct, flat, algorithms):
    one, other = (calibrated(filler, observer, correct, flat, *algorithms) for filler in (0, 19))
    assert one.keys() == other.keys() and len(one) >= (6 if correct else 2)
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_rows_of_tokens_are_chosen_by_the_mask_and_all_rows_of_other_tensors():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert torch.equal(counted(x, mask), torch.tensor([[0.0, 1.0], [2.0, 3.0], [6.0, 7.0]]))
    by_position = x.transpose(0, 1).reshape(6, 2)  # as torch's attention has them: nothing says which rows are which
    assert torch.equal(counted(by_position, mask), by_position)
    assert len(counted(x, None)) == 6 and len(counted(torch.zeros(2, 5, 2), mask)) == 10


def test_only_a_mask_of_tokens_that_count_is_one():
    assert tokens_that_count(None) is None and tokens_that_count(torch.ones(2, 1, 3, 3)) is None
    assert tokens_that_count(torch.tensor([[0.0, -1e4]])) is None  # is added to scores
    assert tokens_that_count(torch.tensor([[1.0, 0.0]])).tolist() == [[True, False]]


def test_a_mask_that_was_traced_as_none_leaves_nothing_out():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 8)

        def forward(self, x, attention_mask=None):
            return self.linear(x if attention_mask is None else x * attention_mask[..., None])

    data = [{"x": torch.randn(2, 3, 64), "attention_mask": None} for _ in range(2)]
    for config in ("int8", "int4_gptq"):
        graph = graphq.prepare(Optional().eval(), config, kwargs=data[0], target="simulation")
        graphq.calibrate(graph, data, progress=False)
