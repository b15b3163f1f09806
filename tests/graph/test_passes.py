"""Pipelines are lists that can be changed by name; passes keep their word, or the checks say which did not."""

import pytest
import torch
from torch import nn

import graphq
from graphq.authoring import FunctionPass, Pipeline, Rewrite, RewritePass, canonical_pipeline, none_of
from graphq.errors import PassError
from graphq.graph.fork import fork
from graphq.graph.invariants import check_all, checking

aten = torch.ops.aten
X = torch.randn(2, 4)


def captured(*layers):
    return fork(graphq.capture(nn.Sequential(*layers), (X,)))


class ReluIsTanh(Rewrite):
    """A lie: tanh is not relu."""

    equivalence = "lossy"

    @staticmethod
    def pattern(op, x):
        return op.relu(x)

    @staticmethod
    def rewrite(m):
        return m.call(aten.tanh.default, m.x)


def test_passes_are_added_and_replaced_by_name_and_the_first_pipeline_stays():
    first = Pipeline("p", [RewritePass(ReluIsTanh, name="a"), RewritePass(ReluIsTanh, name="c")])
    b, d = RewritePass(ReluIsTanh, name="b"), RewritePass(ReluIsTanh, name="d")
    assert repr(first.after("a", b)) == repr(first.before("c", b)) == "p: a → b → c"
    assert repr(first.replace("c", b, d)) == "p: a → b → d"
    assert repr(first.replace("a")) == "p: c"
    assert repr(first) == "p: a → c"
    with pytest.raises(PassError, match="Did you mean 'fold_batchnorm'"):
        canonical_pipeline().after("fold_batchnorms", b)


def test_a_pipeline_of_the_user_is_what_prepare_runs():
    pipeline = canonical_pipeline().after("fold_pad", RewritePass(ReluIsTanh, name="tanh"))
    graph = graphq.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "int8", (X,), canonical=pipeline)
    assert [r.op for r in graphq.explain(graph).rows] == ["linear", "tanh"]


def test_a_broken_promise_is_an_error_that_names_pass_and_rule():
    liar = type("Liar", (ReluIsTanh,), {"equivalence": "ulp"})
    with checking(), pytest.raises(PassError, match="promises 'ulp'") as e:
        RewritePass(liar, name="liar")(captured(nn.ReLU()))
    assert "liar" in str(e.value) and "Liar" in e.value.where


def test_a_pass_that_changes_values_and_does_not_say_so_is_found():
    def sly(gm):
        for node in gm.graph.nodes:
            if node.target is aten.relu.default:
                node.target = aten.tanh.default
        return 0

    with checking(), pytest.raises(PassError, match="promises 'exact'"):
        FunctionPass(sly)(captured(nn.ReLU()))


def test_what_a_pass_requires_and_ensures_is_checked():
    with checking(), pytest.raises(PassError, match="is left"):
        FunctionPass(lambda gm: 0, ensures=(none_of("relu"),))(captured(nn.ReLU()))
    with checking(), pytest.raises(PassError, match="before"):
        FunctionPass(lambda gm: 0, requires=(none_of("relu"),))(captured(nn.ReLU()))
    with checking(False):
        FunctionPass(lambda gm: 0, ensures=(none_of("relu"),))(captured(nn.ReLU()))


def test_a_replacement_keeps_name_path_value_and_stack_trace():
    gm = captured(nn.Linear(4, 4), nn.ReLU())
    before = next(n for n in gm.graph.nodes if n.target is aten.relu.default)
    meta, name = dict(before.meta), before.name
    RewritePass(ReluIsTanh)(gm)
    after = next(n for n in gm.graph.nodes if n.target is aten.tanh.default)
    assert after.name == name
    for key in ("nn_module_stack", "stack_trace", "val"):
        assert after.meta.get(key) is meta.get(key)


def test_values_of_inner_ops_are_inferred():
    class Twice(ReluIsTanh):
        @staticmethod
        def rewrite(m):
            wide = m.call(aten.cat.default, [m.x, m.x], -1)
            return m.call(aten.slice.Tensor, wide, -1, 0, 4)

    gm = captured(nn.ReLU())
    RewritePass(Twice)(gm)
    wide = next(n for n in gm.graph.nodes if n.target is aten.cat.default)
    assert wide.meta["val"].shape[1] == 8


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda gm, node: node.meta.update(val=torch.zeros(3, 3)), "is said to be"),
        (lambda gm, node: _quantize_twice(gm, node), "quantized by"),
        (lambda gm, node: _dangling(gm, node), "feeds nothing"),
    ],
    ids=["a wrong value", "two quantizers on one edge", "a quantizer that nothing reads"],
)
def test_a_broken_graph_is_found(break_it, complaint):
    gm = graphq.prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "int8", (X,))
    check_all(gm)
    break_it(gm, next(n for n in gm.graph.nodes if n.target is aten.linear.default))
    with pytest.raises(PassError, match=complaint):
        check_all(gm)


def _quantize_twice(gm, node):
    call = node.args[0]
    with gm.graph.inserting_after(call):
        again = gm.graph.call_module(call.target, (call.args[0],))
    with gm.graph.inserting_after(again):
        reader = gm.graph.call_function(aten.neg.default, (again,))
    again.meta, reader.meta = dict(call.meta), dict(call.meta)


def _dangling(gm, node):
    with gm.graph.inserting_after(node):
        gm.graph.call_module(node.args[0].target, (node,))
