"""The harness finds what is wrong with a rule, shrinks it, and proves the rules that graphq ships."""

import time

import pytest
import torch

from graphq.errors import PassError
from graphq.graph.passes import Rewrite
from graphq.passes.canonical import canonical_pipeline
from graphq.passes.canonical.fold_batchnorm import affine_of, constant_weight, rebuild
from graphq.testing import Disproved, SmallGraph, check, prove

aten = torch.ops.aten
RULES = [rule for step in canonical_pipeline().passes for rule in getattr(step, "rules", ())]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_every_canonical_rule_keeps_its_promise(rule):
    proof = prove(rule, examples=60)
    assert proof.rewritten >= 5


class WrongAxis(Rewrite):
    """softmax by its formula, over whichever axis ⇒ softmax over the last."""

    @staticmethod
    def pattern(op, x, dims):
        e = op.exp(x - op.amax(x, dims, True))
        return e / op.sum(e, dims, True)

    @staticmethod
    def rewrite(m):
        return m.call(aten.softmax.int, m.x, -1)


class DroppedBias(Rewrite):
    """conv ── batch_norm ⇒ conv', without the bias of the convolution."""

    @staticmethod
    def pattern(op, x, weight, bias, gamma, beta, mean, var):
        return op.batch_norm(op.conv(x, weight, bias), gamma, beta, mean, var)

    @staticmethod
    def check(m):
        return constant_weight(m, "conv")

    @staticmethod
    def rewrite(m):
        s, t = affine_of(m)
        w = m.tensor("weight")
        return rebuild(m, "conv", (w.double() * s.view(-1, *[1] * (w.ndim - 1))).to(w.dtype), t.to(w.dtype))


class IgnoredStride(Rewrite):
    """conv ── relu ⇒ the same, with the convolution built anew."""

    @staticmethod
    def pattern(op, x, weight, bias):
        return op.relu(op.conv(x, weight, bias))

    @staticmethod
    def rewrite(m):
        rest = [[1] * (len(m.weight.shape) - 2), *(m.conv.arg(k) for k in ("padding", "dilation", "groups"))]
        return m.call(aten.relu.default, m.call(m.conv.node.target, m.x, m.weight, m.bias, *rest, like=m.conv))


class WrongUsers(Rewrite):
    """linear · 2 ⇒ linear with doubled parameters, in place: other readers of the linear get them too."""

    @staticmethod
    def pattern(op, x, weight):
        return op.linear(x, op.param(weight), None) * 2.0

    @staticmethod
    def rewrite(m):
        m.linear.node.update_arg(1, m.param("doubled", m.tensor("weight") * 2))
        m.linear.node.prepend(m.linear.node.args[1])
        return m.linear


class WrongBroadcast(Rewrite):
    """linear(x · s, w) ⇒ linear(x, w · s), for any s."""

    @staticmethod
    def pattern(op, x, scale, weight, bias):
        return op.linear(x * op.param(scale), op.param(weight), bias)

    @staticmethod
    def rewrite(m):
        scale = m.tensor("scale").flatten()[0]
        return m.call(aten.linear.default, m.x, m.param("scaled", m.tensor("weight") * scale), m.bias)


class LostDtype(Rewrite):
    """x · sigmoid(x) ⇒ silu, computed in float32 whatever came."""

    @staticmethod
    def pattern(op, x):
        return x * op.sigmoid(x)

    @staticmethod
    def rewrite(m):
        wide = m.call(aten._to_copy.default, m.x, dtype=torch.float32)
        return m.call(aten.silu.default, wide)


WRONG = [WrongAxis, DroppedBias, IgnoredStride, WrongUsers, WrongBroadcast, LostDtype]


@pytest.mark.parametrize("rule", WRONG, ids=lambda r: r.__name__)
def test_a_planted_bug_is_found_and_shrunk(rule):
    start = time.monotonic()
    with pytest.raises(Disproved) as found:
        prove(rule, examples=400)
    assert time.monotonic() - start < 30
    assert found.value.ops <= 6


def test_the_counterexample_is_code_that_shows_the_bug():
    with pytest.raises(Disproved) as found:
        prove(DroppedBias, examples=400)
    with pytest.raises(Disproved, match="values differ"):
        exec(found.value.code, {"DroppedBias": DroppedBias})
    assert len(found.value.code.splitlines()) < 20


def test_a_rule_that_never_applies_is_not_proven():
    class Never(Rewrite):
        @staticmethod
        def pattern(op, x):
            return op.relu(x)

        @staticmethod
        def check(m):
            return "not today"

    with pytest.raises(PassError, match=r"nothing is proven about Never[\s\S]*not today"):
        prove(Never, examples=20)


def test_a_rewrite_that_bakes_a_dynamic_size_is_disproved():
    class Baked(Rewrite):
        @staticmethod
        def pattern(op, x):
            return op.relu(x)

        @staticmethod
        def rewrite(m):
            return m.call(aten.expand.default, m.call(aten.relu.default, m.x), list(m.x.shape))

    with pytest.raises(Disproved, match="symbolic size"):
        prove(Baked)


def test_an_illegal_replacement_is_an_error_that_names_the_op():
    class Illegal(Rewrite):
        @staticmethod
        def pattern(op, x):
            return op.relu(x)

        @staticmethod
        def rewrite(m):
            return m.call(aten.relu.default, m.call(aten.conv2d.default, m.x, m.param("w", torch.ones(1, 7, 1, 1))))

    g = SmallGraph()
    g.output(g.call(aten.relu.default, g.input(2, 3)))
    with pytest.raises(Disproved, match="conv2d"):
        check(g, Illegal)


def test_generated_graphs_are_various():
    """Optional arguments, dtypes, strides, shared inputs, extra readers and dynamic sizes all occur."""
    seen = set()

    class Observed(Rewrite):
        @staticmethod
        def pattern(op, x, y, weight, bias):
            return op.add(op.linear(x, weight, bias), y)

        @staticmethod
        def check(m):
            value = m.x.node.meta["val"]
            seen.update({
                f"bias {m.bias is not None}", str(value.dtype), f"contiguous {value.is_contiguous()}",
                f"dynamic {isinstance(value.shape[0], torch.SymInt)}", f"read elsewhere {m.linear.users > 1}",
                f"parameter {m.tensor('weight') is not None}", f"rank {value.ndim}",
                f"shared {any(a is m.x.node for a in m.root.node.all_input_nodes)}",
            })  # fmt: skip
            return None

        @staticmethod
        def rewrite(m):
            return m.call(aten.add.Tensor, m.y, m.linear)

    prove(Observed, examples=300)
    for word in ("bias", "contiguous", "dynamic", "read elsewhere", "parameter"):
        assert {f"{word} True", f"{word} False"} <= seen, word
    assert {"torch.float32", "torch.float64", "torch.bfloat16"} <= seen
    assert {"rank 1", "rank 2", "rank 3"} <= seen
