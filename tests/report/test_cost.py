"""Cost shares count what torch's own counter of operations counts, and add up."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graphq
from graphq.graph.optable import family_of
from graphq.report.cost import PRODUCTS, _multiplications


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.q, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = self.up(F.relu(self.conv(x)))
        tokens = y.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, 8)
        scores = torch.softmax(self.q(tokens) @ tokens.transpose(1, 2), -1)
        return self.head(scores @ tokens)


@pytest.mark.parametrize("shapes", ["batch", None])
def test_multiplications_are_those_that_torch_counts(shapes):
    model, x = Mixed().eval(), torch.randn(2, 6, 8, 8)
    graph = graphq.capture(model, (x,), dynamic_shapes=shapes)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        graph(x)
    products = [n for n in graph.graph.nodes if n.op == "call_function" and family_of(n.target) in PRODUCTS]
    assert len(products) == 6
    assert 2 * sum(_multiplications(n, family_of(n.target)) for n in products) == counter.get_total_flops()


def test_shares_add_up_and_integers_are_cheaper():
    model, data = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)), [torch.randn(4, 64)]
    rows = {
        c: graphq.explain(graphq.quantize(model, c, data, progress=False)).rows for c in ("int8", "int8_weight_only")
    }
    for explained in rows.values():
        assert sum(r.share for r in explained) == pytest.approx(1)
        assert all(r.share > 0 for r in explained if r.action != "skip")
    gelu = {c: next(r.share for r in explained if r.op == "gelu") for c, explained in rows.items()}
    assert gelu["int8"] > gelu["int8_weight_only"]  # the products around it take half the time
