"""Five planted near misses: the true obstacle is named first."""

import torch
from torch import nn
from torch.nn import functional as F

import graphq
from graphq.graph.near_miss import report
from graphq.graph.passes import Rewrite


class ConvScaleRelu(Rewrite):
    """relu(conv(x, w) · 2), with a convolution of stride 1 that nothing else reads."""

    @staticmethod
    def pattern(op, x, w, b):
        return op.relu(op.once(op.conv(x, op.param(w), b, stride=[1, 1])) * 2.0)


class Block(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, stride=stride)


X = torch.randn(1, 3, 4, 4)


def nearest(forward, stride=1):
    module = type("Planted", (Block,), {"forward": forward})(stride)
    found = report(graphq.capture(module, (X,), dynamic_shapes=None), ConvScaleRelu)
    assert found.matches == []
    return found.misses[0]


def test_the_unspoiled_block_matches():
    module = type("Planted", (Block,), {"forward": lambda self, x: F.relu(self.conv(x) * 2.0)})()
    assert len(report(graphq.capture(module, (X,), dynamic_shapes=None), ConvScaleRelu).matches) == 1


def test_a_wrong_attribute_is_named():
    miss = nearest(lambda self, x: F.relu(self.conv(x) * 2.0), stride=2)
    assert "stride" in miss.reason and "2" in miss.reason and "asks for 1" in miss.reason
    assert miss.matched == 3


def test_another_reader_is_named():
    def forward(self, x):
        y = self.conv(x)
        return F.relu(y * 2.0), y.sigmoid()

    assert "also read by sigmoid" in nearest(forward).reason


def test_an_op_in_between_is_named():
    miss = nearest(lambda self, x: F.relu(self.conv(x).exp() * 2.0))
    assert "exp" in miss.reason and "asks for conv" in miss.reason


def test_a_computed_weight_is_named():
    miss = nearest(lambda self, x: F.relu(F.conv2d(x, self.conv.weight.abs()) * 2.0))
    assert "weight" in miss.reason and "abs" in miss.reason and "parameter" in miss.reason


def test_another_last_op_is_named():
    miss = nearest(lambda self, x: F.gelu(self.conv(x) * 2.0))
    assert "read by gelu" in miss.reason and "asks for relu" in miss.reason


def test_a_wrong_number_is_named():
    miss = nearest(lambda self, x: F.relu(self.conv(x) * 2.5))
    assert "2.5" in miss.reason and "asks for 2.0" in miss.reason


def test_what_check_declines_is_a_miss_with_its_reason():
    class Declining(ConvScaleRelu):
        @staticmethod
        def check(m):
            return "not today"

    module = type("Planted", (Block,), {"forward": lambda self, x: F.relu(self.conv(x) * 2.0)})()
    found = report(graphq.capture(module, (X,), dynamic_shapes=None), Declining)
    assert found.misses[0].reason == "check: not today"
