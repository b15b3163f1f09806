"""In-place ops become functional without a second trace, and only where nothing else can see the write."""

import pytest
import torch
from torch import nn

import graphq
from graphq.graph.functionalize import functionalize, mutates


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        before = y * 2
        y += x
        return torch.relu_(y) + before


class ThroughAView(nn.Module):
    def forward(self, x):
        y = x * 2
        first = y[:, 0]
        y += 1
        return first


class OfAView(nn.Module):
    def forward(self, x):
        y = x * 2
        y[:, 0].add_(1)
        return y


class AfterDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout()

    def forward(self, x):
        y = x * 2
        z = self.dropout(y)
        z += 1
        return y + z


X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("make", [Residual, ThroughAView, OfAView])
def test_the_captured_graph_has_no_writes_and_computes_the_same(make):
    model = make().eval()
    gm = graphq.capture(model, (X,))
    assert not any(mutates(n) for n in gm.graph.nodes)
    assert torch.equal(gm(X), model(X.clone()))


def exported(model):
    return torch.export.export(model.eval(), (X,), strict=False).module(check_guards=False)


def test_writes_to_a_result_that_nothing_else_sees_need_no_second_trace():
    assert functionalize(exported(Residual()))


@pytest.mark.parametrize("make", [ThroughAView, OfAView, AfterDropout])
def test_writes_that_another_name_sees_are_left_to_torch(make):
    assert not functionalize(exported(make()))
