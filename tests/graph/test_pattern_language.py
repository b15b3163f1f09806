"""What each word of the pattern language means."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphq
from graphq.errors import PassError
from graphq.graph.match import RuleIndex
from graphq.graph.passes import Pipeline, Rewrite, RewritePass

aten = torch.ops.aten
X, Y, W = torch.randn(2, 4), torch.randn(2, 4), torch.randn(4, 4)


def graph_of(function, *args):
    class Wrapped(nn.Module):
        def forward(self, *inputs):
            return function(*inputs)

    return graphq.capture(Wrapped(), args, dynamic_shapes=None)


def rule(pattern_function, **more):
    return type("Rule", (Rewrite,), {"pattern": staticmethod(pattern_function), **more})


def matches(gm, pattern_function):
    index = RuleIndex([rule(pattern_function)])
    return [m for n in gm.graph.nodes for _, found in index.at(gm, n) for m in itertools.islice(found, 1)]


def rewritten(gm, *rules):
    Pipeline("test", [RewritePass(*rules)])(gm)
    return gm


def ops(gm):
    return [str(n.target).split(".")[1] for n in gm.graph.nodes if n.op == "call_function"]


def test_a_chain_matches_every_order_and_bracketing_of_a_sum():
    def pattern(op, x, y, z):
        return op.chain("add", op.relu(x), op.tanh(y), z)

    for f in (
        lambda a, b: a.relu() + b.tanh() + a,
        lambda a, b: a + (b.tanh() + a.relu()),
        lambda a, b: (b.tanh() + a) + a.relu(),
    ):
        (m,) = matches(graph_of(f, X, Y), pattern)
        assert m.z.node.name.startswith("input")
    assert matches(graph_of(lambda a, b: a.relu() + b.tanh(), X, Y), pattern) == []


def test_a_chain_takes_the_other_terms_as_rest_and_stops_where_a_partial_sum_is_read():
    def pattern(op, x, others):
        return op.chain("add", op.relu(x), rest=others)

    (m,) = matches(graph_of(lambda a, b: a + b + a.tanh() + b.relu(), X, Y), pattern)
    assert len(m.others) == 3

    def escaping(a, b):
        partial = a + b
        return partial + a.relu(), partial

    (m,) = matches(graph_of(escaping, X, Y), pattern)
    assert [v.family for v in m.others] == ["add"]


def test_each_matches_lists_of_any_length_and_binds_tuples():
    def pattern(op, x, w, b):
        return op.cat(op.each(op.linear(x, w, b)), -1)

    def three(a):
        return torch.cat([F.linear(a, W), F.linear(a.relu(), W), F.linear(a, W)], -1)

    (m,) = matches(graph_of(three, X), pattern)
    assert len(m.x) == 3 and m.x[0].node is m.x[2].node and m.b == (None, None, None)
    assert len(m.nodes) == 4
    assert matches(graph_of(lambda a: torch.cat([F.linear(a, W), a], -1), X), pattern) == []


def test_given_wants_the_argument_and_param_wants_a_constant():
    with_bias, without = (graphq.capture(nn.Linear(4, 3, bias=b), (X,)) for b in (True, False))

    def pattern(op, x, w, b):
        return op.linear(x, op.param(w), op.given(b))

    assert [len(matches(g, pattern)) for g in (with_bias, without)] == [1, 0]
    computed = graph_of(lambda a, b: F.linear(a, b.relu(), b[0, :2]), X, torch.randn(2, 4))
    assert matches(computed, pattern) == []


def test_once_refuses_an_inner_result_that_escapes_and_without_it_the_result_stays():
    def f(a):
        inner = a.relu()
        return inner * 2.0, inner

    assert len(matches(graph_of(f, X), lambda op, x: op.relu(x) * 2.0)) == 1
    assert matches(graph_of(f, X), lambda op, x: op.once(op.relu(x)) * 2.0) == []

    class Wrapped(Rewrite):
        @staticmethod
        def pattern(op, x):
            return op.relu(x) * 2.0

        @staticmethod
        def rewrite(m):
            return m.call(aten.relu.default, m.call(aten.mul.Tensor, m.x, 2.0))

    gm = graph_of(f, X)
    want = gm(X)
    for got, expected in zip(rewritten(gm, Wrapped)(X), want, strict=True):
        assert torch.equal(got, expected)
    assert ops(gm).count("relu") == 2


def test_the_same_expression_twice_is_the_same_node_twice():
    def pattern(op, x):
        y = op.relu(x)
        return y * op.sigmoid(y)

    def twice(a):
        return a.relu() * torch.sigmoid(a.relu())

    def shared(a):
        y = a.relu()
        return torch.sigmoid(y) * y

    assert len(matches(graph_of(shared, X), pattern)) == 1
    assert matches(graph_of(twice, X), pattern) == []


def test_either_chooses_between_expressions_and_between_constants():
    gm = graph_of(lambda a: torch.softmax(a, 0) + torch.softmax(a, 1) + torch.softmax(a, -1), X)
    assert len(matches(gm, lambda op, x: op.softmax(x, op.either(1, -1)))) == 2


def test_numbers_match_tensors_of_one_element_and_take_a_tolerance():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.7071))

        def forward(self, x):
            return x * self.scale

    gm = graphq.capture(Scaled(), (X,))
    assert len(matches(gm, lambda op, x: op.mul(x, op.number(0.5**0.5, tolerance=1e-3)))) == 1
    assert matches(gm, lambda op, x: op.mul(x, 0.5**0.5)) == []


def test_an_op_without_a_family_is_named_by_its_overload():
    gm = graph_of(lambda a: torch.topk(a, 2)[0], X)
    (m,) = matches(gm, lambda op, x: op.getitem(op.aten(aten.topk.default)(x, 2), 0))
    assert m.topk.family == "topk"
    with pytest.raises(PassError, match="op overloads"):
        matches(gm, lambda op, x: op.aten(torch.topk)(x))


def qkv(op, x, wq, wk):
    return op.linear(x, wq, None), op.linear(x, wk, None)


class MergeLinears(Rewrite):
    """linear(x, a), linear(x, b)  ⇒  the two halves of linear(x, [a; b])."""

    pattern = staticmethod(qkv)

    @staticmethod
    def rewrite(m):
        both = m.call(aten.linear.default, m.x, m.param("merged", torch.cat([m.tensor("wq"), m.tensor("wk")])))
        rows = m.tensor("wq").shape[0]
        return (
            m.call(aten.slice.Tensor, both, -1, 0, rows, like=m.roots[0]),
            m.call(aten.slice.Tensor, both, -1, rows, 2**62, like=m.roots[1]),
        )


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4, bias=False), nn.Linear(4, 6, bias=False)

    def forward(self, x):
        early = self.q(x).relu()  # reads the first result before the second is computed
        return early, self.k(x)


def test_a_pattern_with_two_results_replaces_both_and_moves_early_readers():
    gm = graphq.capture(TwoLinears(), (X,))
    want = gm(X)
    rewritten(gm, MergeLinears)
    assert ops(gm).count("linear") == 1
    for got, expected in zip(gm(X), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_two_results_that_depend_on_each_other_are_declined_with_the_reason():
    class Both(Rewrite):
        @staticmethod
        def pattern(op, x, y):
            return op.tanh(x), op.sigmoid(op.add(x, y))

        @staticmethod
        def rewrite(m):
            raise AssertionError("not legal")

    def dependent(a):
        t = a.tanh()
        return torch.sigmoid(a + t.relu())

    gm = graph_of(dependent, X)
    result = RewritePass(Both)(gm)
    assert result.changed == 0 and "depends on another result" in result.declined[0][2]


def test_check_sees_the_next_order_of_operands_when_it_declines_the_first():
    class ReluFirst(Rewrite):
        equivalence = "lossy"

        @staticmethod
        def pattern(op, x, y):
            return op.mul(x, y)

        @staticmethod
        def check(m):
            return None if m.x.family == "relu" else "x is not a relu"

        @staticmethod
        def rewrite(m):
            return m.call(aten.mul.Tensor, m.x.arg("self"), m.y)

    for f in (lambda a, b: a.relu() * b, lambda a, b: b * a.relu()):
        assert RewritePass(ReluFirst)(graph_of(f, X, Y)).changed == 1


def test_patterns_are_made_of_patterns():
    def swish(op, x):
        return x * op.sigmoid(x)

    (m,) = matches(graph_of(lambda a: torch.sigmoid(a) * a * 2.0, X), lambda op, x: swish(op, x) * 2.0)
    assert m.x.node.op == "placeholder"


def test_overlapping_candidates_go_to_the_first_in_graph_order_and_then_the_first_rule():
    def pair(name, target):
        return type(name, (Rewrite,), {
            "pattern": staticmethod(lambda op, x: op.relu(op.relu(x))),
            "rewrite": staticmethod(lambda m: m.call(target, m.x)),
            "equivalence": "lossy",
        })  # fmt: skip

    gm = graph_of(lambda a: a.relu().relu().relu(), X)
    result = RewritePass(pair("First", aten.tanh.default), pair("Second", aten.sigmoid.default))(gm)
    assert dict(result.by_rule) == {"First": 1}
    gm.recompile()
    torch.testing.assert_close(gm(X), X.tanh().relu())


def test_a_rewrite_that_rebuilds_what_it_looks_for_is_stopped():
    class Forever(Rewrite):
        @staticmethod
        def pattern(op, x):
            return op.relu(x)

        @staticmethod
        def rewrite(m):
            return m.call(aten.relu.default, m.x)

    with pytest.raises(PassError, match="does not come to an end"):
        RewritePass(Forever, fixpoint=True)(graph_of(lambda a: a.relu(), X))
    assert RewritePass(Forever)(graph_of(lambda a: a.relu(), X)).changed == 1


def test_a_rewrite_with_too_few_results_is_refused_by_name():
    class One(MergeLinears):
        @staticmethod
        def rewrite(m):
            return m.roots[0]

    with pytest.raises(PassError, match="2 results"):
        RewritePass(One)(graphq.capture(TwoLinears(), (X,)))


def test_a_module_called_twice_and_tied_weights_are_two_matches_of_one_parameter():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.inner.weight

        def forward(self, x):
            return self.tied(self.inner(self.inner(x)))

    found = matches(graphq.capture(Twice(), (X,)), lambda op, x, w, b: op.linear(x, w, b))
    assert len(found) == 3
    assert len({m.tensor("w").data_ptr() for m in found}) == 1
