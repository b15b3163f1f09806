"""Patterns match what their expression means, and nothing else."""

import itertools

import torch
from torch import nn

import graphq
from graphq.graph.match import RuleIndex
from graphq.graph.passes import Pipeline, Rewrite, RewritePass


def graph_of(function, *args):
    class Wrapped(nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    return graphq.capture(Wrapped(), args, dynamic_shapes=None)


def rule(pattern_function):
    return type("Rule", (Rewrite,), {"pattern": staticmethod(pattern_function)})


def matches(gm, pattern_function):
    index = RuleIndex([rule(pattern_function)])
    return [m for n in gm.graph.nodes for _, found in index.at(gm, n) for m in itertools.islice(found, 1)]


X, Y = torch.randn(2, 4), torch.randn(2, 4)


def test_two_captures_may_bind_one_node():
    (m,) = matches(graph_of(lambda a: a + a, X), lambda op, x, y: op.add(x, y))
    assert m.x.node is m.y.node


def test_one_capture_twice_wants_the_same_node_twice():
    def square(op, x):
        return op.mul(x, x)

    assert len(matches(graph_of(lambda a, b: a * b, X, Y), square)) == 0
    assert len(matches(graph_of(lambda a: a * a, X), square)) == 1


def test_commuted_operands_match_at_depth_three():
    def pattern(op, x, y):
        return op.add(op.mul(op.add(op.relu(x), y), 2.0), x)

    for f in (
        lambda a, b: (a.relu() + b) * 2.0 + a,
        lambda a, b: a + (b + a.relu()) * 2.0,
        lambda a, b: a + 2.0 * (a.relu() + b),
    ):
        assert len(matches(graph_of(f, X, Y), pattern)) == 1
    assert matches(graph_of(lambda a, b: (a.relu() + b) * 2.0 + b, X, Y), pattern) == []


def test_an_optional_argument_matches_its_absence_and_a_demanded_absence_its_absence_only():
    with_bias, without = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)
    graphs = [graphq.capture(m, (X,)) for m in (with_bias, without)]
    free = [matches(g, lambda op, x, w, b: op.linear(x, w, b)) for g in graphs]
    assert [m[0].b is not None for m in free] == [True, False]
    assert [len(matches(g, lambda op, x, w: op.linear(x, w, None))) for g in graphs] == [0, 1]


def test_numbers_match_with_tolerance_and_attributes_by_name():
    gm = graph_of(lambda a: torch.softmax(a * 0.70710678, -1), X)
    assert len(matches(gm, lambda op, x: op.softmax(op.mul(x, 0.5**0.5), dim=-1))) == 1
    assert len(matches(gm, lambda op, x: op.softmax(op.mul(x, 0.7), dim=-1))) == 0
    assert len(matches(gm, lambda op, x: op.softmax(x, dim=0))) == 0


def test_a_sum_with_alpha_is_not_a_plain_sum():
    gm = graph_of(lambda a, b: torch.add(a, b, alpha=2), X, Y)
    assert matches(gm, lambda op, x, y: op.add(x, y)) == []


def test_a_chain_of_five_thousand_nodes_is_walked_without_recursion():
    gm = graphq.capture(nn.ReLU(), (X,))
    last = next(n for n in gm.graph.nodes if n.op == "call_function")
    with gm.graph.inserting_after(last):
        pass
    output = next(n for n in gm.graph.nodes if n.op == "output")
    for _ in range(5000):
        with gm.graph.inserting_before(output):
            new = gm.graph.call_function(torch.ops.aten.neg.default, (last,))
        new.meta = dict(last.meta)
        last = new
    output.args = ((last,),)
    assert len(matches(gm, lambda op, x: op.relu(x))) == 1

    class ReluIsRelu6(Rewrite):
        @staticmethod
        def pattern(op, x):
            return op.relu(x)

        @staticmethod
        def rewrite(m):
            return m.call(torch.ops.aten.relu6.default, m.x)

    assert RewritePass(ReluIsRelu6)(gm).changed == 1


def test_a_rewrite_keeps_inner_values_that_are_used_elsewhere():
    class Fuse(Rewrite):
        @staticmethod
        def pattern(op, x):
            return op.mul(x, op.sigmoid(x))

        @staticmethod
        def rewrite(m):
            return m.call(torch.ops.aten.silu.default, m.x)

    gm = graph_of(lambda a: (a * torch.sigmoid(a), torch.sigmoid(a) + 1), X)
    before = gm(X)
    shared = graph_of(lambda a: (lambda s: (a * s, s + 1))(torch.sigmoid(a)), X)
    for g in (gm, shared):
        Pipeline("p", [RewritePass(Fuse)])(g)
        for got, want in zip(g(X), before, strict=True):
            torch.testing.assert_close(got, want)


def test_check_gives_the_reason_for_which_a_match_was_declined():
    class Never(Rewrite):
        @staticmethod
        def pattern(op, x):
            return op.relu(x)

        @staticmethod
        def check(m):
            return "not today"

    result = RewritePass(Never)(graph_of(lambda a: a.relu(), X))
    assert [(r, why) for r, _, why in result.declined] == [("Never", "not today")]
    assert result.changed == 0


def test_an_unknown_family_in_a_pattern_is_an_error_with_a_suggestion():
    import pytest

    from graphq.errors import PassError

    with pytest.raises(PassError, match="'linear'"):
        matches(graph_of(lambda a: a.relu(), X), lambda op, x: op.liner(x))
