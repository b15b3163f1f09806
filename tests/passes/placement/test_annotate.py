"""What is decided about ops, and what placement makes of it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.config.presets import ACTIVATION_UINT8, CONFIGS, WEIGHT_INT8
from graphq.errors import TargetError
from graphq.graph.ops import QUANTIZE


class Lambda(nn.Module):
    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *x):
        return self.function(self, *x)


def quantized(function, *x, config="int8", **modules):
    model = Lambda(function, **modules)
    gm = graphq.quantize(model, config, [x], progress=False)
    return gm, {r.node: r for r in graphq.explain(gm).rows}


def actions(rows):
    return [(r.op.partition(".")[0], r.action) for r in rows.values() if r.action != "skip"]


def image(c=3, s=8):
    return torch.randn(2, c, s, s)


def conv(i=3, o=4, k=3, **kw):
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)


def test_a_residual_block_is_all_integers_with_one_q_per_tensor():
    def block(m, x):
        y = F.relu(m.a(x))
        return m.d(F.relu(m.c(F.relu(m.b(y))) + y))

    gm, rows = quantized(block, image(), a=conv(), b=conv(4), c=conv(4), d=conv(4))
    assert {a for _, a in actions(rows)} == {"quantize", "fuse"}
    tensors = [n.args[0] for n in gm.graph.nodes if n.target is QUANTIZE]
    assert len(tensors) == len(set(tensors)) == 6  # x, y, b, c, the sum, and the result of d


def test_an_add_between_float_ops_stays_float_without_q():
    gm, rows = quantized(lambda m, x: F.layer_norm(m.fc(x) + x, [4]), torch.randn(2, 5, 4), fc=nn.Linear(4, 4))
    assert actions(rows) == [("linear", "quantize"), ("add", "float"), ("layer_norm", "float")]
    assert sum(n.target is QUANTIZE for n in gm.graph.nodes) == 1


def test_ops_that_move_data_use_the_scale_of_their_input():
    gm, rows = quantized(lambda m, x: m.b(F.max_pool2d(m.a(x), 2)), image(), a=conv(), b=conv(4))
    assert ("max_pool2d", "carry") in actions(rows)
    q = [n for n in gm.graph.nodes if n.target is QUANTIZE]
    pooled = next(n for n in q if "max_pool" in n.args[0].name)
    conv_out = next(n for n in q if "conv" in n.args[0].name and n.args[1].target == pooled.args[1].target)
    assert conv_out is not pooled


def test_additive_masks_and_shape_computations_are_never_quantized():
    def attend(m, x):
        scores = m.q(x) @ m.k(x).transpose(-1, -2)
        mask = torch.where(torch.ones(x.shape[1], x.shape[1]).tril() > 0, 0.0, -torch.inf)
        return (scores + mask).softmax(-1) @ m.v(x)

    everything = QuantConfig(rules=(Rule(select="*", scheme="int8"),))
    modules = {k: nn.Linear(4, 4) for k in "qkv"}
    gm, rows = quantized(attend, torch.randn(2, 5, 4), config=everything, **modules)
    add = next(r for r in rows.values() if r.op.startswith("add") and "mask" in r.reason)
    assert add.action == "float"
    scales = [b for n, b in gm.named_buffers() if n.endswith("scale")]
    assert all(torch.isfinite(s).all() and (s < 1e3).all() for s in scales)


def test_attention_products_stay_float_until_a_rule_asks():
    def product(m, x):
        return m.a(x) @ m.b(x).transpose(-1, -2)

    modules = {k: nn.Linear(4, 4) for k in "ab"}
    _, rows = quantized(product, torch.randn(2, 5, 4), **modules)
    assert next(r for r in rows.values() if r.op == "matmul").action == "float"
    config = CONFIGS["int8"].with_rules(Rule(select="matmul", scheme="int8"))
    _, rows = quantized(product, torch.randn(2, 5, 4), config=config, **modules)
    assert next(r for r in rows.values() if r.op == "matmul").predicted == "MatMulIntegerToFloat"


def test_a_concatenation_of_integers_is_one_kernel():
    _, rows = quantized(
        lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), image(), a=conv(o=2), b=conv(o=3), c=conv(5, 2)
    )
    assert ("cat", "quantize") in actions(rows)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_uneven_zero_padding_is_computed_in_the_convolutions_kernel(groups):
    c = nn.Conv2d(4, 4, 3, stride=2, groups=groups)
    _, rows = quantized(lambda m, x: m.c(F.pad(x, [0, 1, 0, 1])), image(4), c=c)
    assert actions(rows) == [("pad", "fuse"), ("conv2d", "quantize")]


def test_transposed_convolutions_say_why_they_stay_float():
    _, rows = quantized(lambda m, x: m.t(x), image(), t=nn.ConvTranspose2d(3, 4, 2))
    (row,) = (r for r in rows.values() if r.action != "skip")
    assert (row.action, "ConvTranspose" in row.reason) == ("float", True)


def test_weight_only_leaves_activations_alone():
    model = Lambda(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(8, 8), b=nn.Linear(8, 2))
    gm = graphq.quantize(model, "int8_weight_only", [(torch.randn(3, 8),)], progress=False)
    assert not any(n.target is QUANTIZE for n in gm.graph.nodes)
    rows = graphq.explain(gm).rows
    assert [r.action for r in rows] == ["weight_only", "float", "weight_only"]
    assert rows[0].predicted == "MatMulNBits"


def test_a_weight_only_file_computes_what_was_simulated(tmp_path):
    model = Lambda(lambda m, x: m.b(F.relu(m.a(x))), a=nn.Linear(8, 8), b=nn.Linear(8, 2))
    x = torch.randn(3, 8)
    gm = graphq.quantize(model, "int8_weight_only", [(x,)], progress=False)
    path = graphq.export(gm, tmp_path / "model.onnx")
    assert graphq.verify(gm, path, [(x,)]).output_sqnr > 80


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"format": "uint16"}, "no kernels for uint16"),
        ({"granularity": "channel", "axis": 1}, "scale per channel on activations"),
        ({"dynamic": True, "granularity": "token"}, "find scales at run time"),
        ({"format": "int8", "narrow_range": True}, "saturates to the whole format"),
    ],
)
def test_what_the_target_cannot_compute_is_an_error_that_names_the_layer(spec, complaint):
    scheme = Scheme(weight=WEIGHT_INT8, input=ACTIVATION_UINT8.model_copy(update=spec))
    config = QuantConfig(rules=(Rule(select="*", scheme=scheme),))
    with pytest.raises(TargetError, match=complaint) as e:
        arm = graphq.get_target("onnxruntime", cpu="arm")  # takes int8 activations too
        graphq.prepare(nn.Sequential(nn.Linear(4, 4)), config, (torch.randn(2, 4),), target=arm)
    assert "linear" in e.value.where


def test_a_decision_can_be_vetoed_between_annotate_and_place():
    from graphq.config import QuantConfig as Config
    from graphq.graph.decision import decision_of
    from graphq.passes.canonical import canonical_pipeline
    from graphq.passes.placement import annotate, insert_quantizers

    gm = graphq.capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.randn(2, 4),))
    canonical_pipeline()(gm)
    annotate(gm, Config.load("int8"), graphq.get_target("onnxruntime", cpu="vnni"))
    first = next(n for n in gm.graph.nodes if decision_of(n) is not None)
    decision_of(first).to_float("I want to see it")
    insert_quantizers(gm)
    assert [r.action for r in graphq.explain(gm).rows] == ["float", "quantize"]


def test_a_dead_channel_with_a_large_bias_does_not_overflow_int32():
    layer = nn.Linear(4, 3)
    layer.weight.data[1] = 1e-12
    layer.bias.data[1] = 5.0
    model, x = nn.Sequential(layer), torch.randn(20, 4)
    gm = graphq.quantize(model, "int8", [x], progress=False)
    assert graphq.compare(model, gm, [x], per_op=False).sqnr > 30


def test_output_specs_are_placed_where_a_scheme_asks():
    scheme = Scheme(weight=WEIGHT_INT8, input=ACTIVATION_UINT8, output=QuantSpec(format="uint8", symmetric=False))
    gm, _ = quantized(
        lambda m, x: m.fc(x), torch.randn(2, 4), config=QuantConfig(rules=(Rule(select="*", scheme=scheme),)),
        fc=nn.Linear(4, 4),
    )  # fmt: skip
    assert sum(n.target is QUANTIZE for n in gm.graph.nodes) == 2
