"""A pattern can be traced from the block that it shall find."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphq
from graphq.authoring import Rewrite, RewritePass, canonical_pipeline, report, traced
from graphq.errors import PassError
from graphq.graph.fork import fork
from graphq.testing import prove

X = torch.randn(2, 3, 8)


class SelfGated(nn.Module):
    """A block of a user's own."""

    def __init__(self, features):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(features), nn.Linear(features, features)

    def forward(self, x):
        return x + self.proj(self.norm(x)) * torch.sigmoid(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.other = SelfGated(8), SelfGated(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.other(self.a(x)).relu())


def canonical(model, *inputs):
    gm = fork(graphq.capture(model, inputs))
    canonical_pipeline()(gm)
    return gm


class FindBlock(Rewrite):
    pattern = traced(SelfGated(8), X)


def test_a_traced_block_is_found_wherever_the_model_has_it():
    found = report(canonical(Model(), X), FindBlock)
    assert [m.root.path for m in found.matches] == ["a", "b"]
    assert found.matches[0].tensor("proj_weight").shape == (8, 8)


def test_other_sizes_match_other_attributes_do_not():
    wide = nn.Sequential(SelfGated(16))
    assert report(canonical(wide, torch.randn(2, 3, 16)), FindBlock).matches == []  # the norm's size is an attribute

    class FindScaled(Rewrite):
        pattern = traced(lambda a, b: F.gelu(a) * 2.0 + b, X, X)

    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return x.relu() + F.gelu(x) * self.factor

    assert len(report(canonical(Scaled(2.0), X), FindScaled).matches) == 1
    assert report(canonical(Scaled(3.0), X), FindScaled).matches == []


def test_a_traced_pattern_can_be_rewritten_and_proven():
    class Fold(Rewrite):
        pattern = traced(lambda x: (x * 2.0) * 0.5, X)
        equivalence = "exact"

        @staticmethod
        def rewrite(m):
            return m.call(torch.ops.aten.mul.Tensor, m.inputs_0, 1.0)

    assert prove(Fold, examples=30).rewritten > 0
    gm = canonical(nn.Sequential(nn.ReLU()), X)
    assert RewritePass(Fold)(gm).changed == 0


def test_a_function_that_computes_nothing_is_no_pattern():
    with pytest.raises(PassError, match="applies no op"):
        traced(lambda x: x, X)
