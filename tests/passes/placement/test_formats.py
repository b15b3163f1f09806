"""Every format and granularity is simulated in the graph as the numerics say, and converts without a difference."""

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import ConfigError, TargetError
from graphq.graph.ops import CHOOSE_QPARAMS
from graphq.numerics.affine import fake_quantize, quantize, range_of, sqnr
from graphq.numerics.formats import BLOCK_FORMATS, FORMATS
from graphq.numerics.scales import choose_qparams

FP8 = QuantSpec(format="fp8_e4m3")
PAIRS = {
    **{n: (QuantSpec(format=n), QuantSpec(format=n, dynamic="local" if n == "nvfp4" else True)) for n in BLOCK_FORMATS},
    "fp8": (FP8, FP8),
    "fp8 floor": (QuantSpec(format="fp8_e5m2", rounding="floor", saturate=False), None),
    "fp8 blocks": (QuantSpec(format="fp8_e4m3", granularity="block", block=(16, 16)), None),
    "int8 token": (
        QuantSpec(format="int8", granularity="channel"), QuantSpec(format="int8", granularity="token", dynamic=True),
    ),
    "uint4 group": (QuantSpec(format="uint4", symmetric=False, granularity="group", group_size=16), None),
    "int8 pof2": (QuantSpec(scale="pof2"), QuantSpec(format="uint8", symmetric=False, scale="pof2")),
    "int4 then fp8": (QuantSpec(format="int4", granularity="group", group_size=32, then=FP8), FP8),
    "fp8 then int4": (
        QuantSpec(format="fp8_e4m3", then=QuantSpec(format="int4", granularity="channel")),
        QuantSpec(format="fp8_e4m3", dynamic=True),
    ),
    "bf16": (QuantSpec(format="bfloat16"), None),
    "head": (QuantSpec(granularity="channel"), QuantSpec(format="int8", granularity="head", axis=-1)),
}  # fmt: skip


def config(weight, given):
    return QuantConfig(rules=(Rule(select="linear", scheme=Scheme(weight=weight, input=given)),))


def by_hand(x, spec):
    """What a spec makes of a tensor that is seen whole."""
    fmt, block = FORMATS[spec.format], spec.block_for(x.ndim)
    lo, hi = range_of(x, block)
    options = {"narrow_range": spec.narrow_range}
    scale, zero = choose_qparams(
        lo, hi, fmt, symmetric=spec.symmetric, scale=spec.scale, mode=spec.scale_mode, span=spec.span, **options
    )
    x = fake_quantize(x, scale, zero, block, fmt, rounding=spec.rounding, saturate=spec.saturate, **options)
    return by_hand(x, spec.then.model_copy(update={"then": None})) if spec.then else x


@pytest.mark.parametrize("name", PAIRS)
def test_the_graph_computes_what_the_numerics_say_and_converts_exactly(name):
    weight, given = PAIRS[name]
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32).eval(), torch.randn(4, 6, 64)
    prepared = graphq.prepare(layer, config(weight, given), (x,), target="simulation")
    calibrated = graphq.calibrate(prepared, [x], progress=False)
    if weight.then is None:
        w = by_hand(layer.weight.detach(), weight)
        wanted = nn.functional.linear(by_hand(x, given) if given else x, w, layer.bias)
        torch.testing.assert_close(calibrated(x), wanted, rtol=0, atol=0)
    assert sqnr(layer(x), calibrated(x)) > 9
    assert torch.equal(graphq.convert(calibrated)(x), calibrated(x))


def test_a_dynamic_range_is_that_of_every_call():
    layer, x = nn.Linear(64, 32).eval(), torch.randn(8, 64)
    given = QuantSpec(format="int8", granularity="token", dynamic=True)
    prepared = graphq.prepare(layer, config(QuantSpec(granularity="channel"), given), (x,), target="simulation")
    converted = graphq.convert(graphq.calibrate(prepared, [x], progress=False))
    assert any(n.target is CHOOSE_QPARAMS for n in converted.graph.nodes)
    for factor in (1.0, 1e3, 1e-3):
        assert sqnr(layer(x * factor), converted(x * factor)) > 35


def test_sizes_that_groups_do_not_divide_are_an_error_that_names_the_weight_or_are_filled_up():
    layer, x = nn.Linear(40, 8).eval(), torch.randn(4, 40)
    spec = QuantSpec(format="int4", granularity="group", group_size=32)
    prepared = graphq.prepare(layer, config(spec, None), (x,), target="simulation")
    with pytest.raises(ConfigError, match="weight") as e:
        graphq.calibrate(prepared, [x], progress=False)
    assert "ragged" in str(e.value)
    ragged = spec.model_copy(update={"ragged": True})
    graphq.convert(graphq.calibrate(graphq.prepare(layer, config(ragged, None), (x,), target="simulation"), [x]))(x)


@pytest.mark.parametrize("spec", [FP8, QuantSpec(format="mxfp4"), QuantSpec(format="int4", then=FP8)])
def test_onnxruntime_refuses_weights_that_it_has_no_kernel_for(spec):
    with pytest.raises(TargetError, match="simulation"):
        graphq.prepare(nn.Linear(64, 8).eval(), config(spec, None), (torch.randn(2, 64),))


def test_activations_need_dynamic_groups():
    with pytest.raises(TargetError, match="dynamic"):
        graphq.prepare(
            nn.Linear(64, 8).eval(), config(FP8, QuantSpec(format="mxfp4")), (torch.randn(2, 64),), target="simulation"
        )


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"format": "fp8_e4m3", "symmetric": False}, "no zero point"),
        ({"granularity": "token"}, "dynamic"),
        ({"granularity": "channel", "dynamic": True}, "per tensor, token or group"),
        ({"format": "mxfp4", "dynamic": "local"}, "e4m3"),
        ({"scale": "e4m3"}, "groups"),
        ({"format": "mx6", "scale": "float"}, "e8m0"),
        ({"format": "fp8_e4m4"}, "'fp8_e4m3'"),
    ],
)
def test_specs_that_mean_nothing_say_why(fields, complaint):
    with pytest.raises(ConfigError, match=complaint):
        QuantSpec(**fields)


def test_readers_of_one_tensor_that_ask_for_different_numbers_are_an_error():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x):
            return self.a(x) + self.b(x)

    rules = (
        Rule(select="a", scheme=Scheme(weight=FP8, input=QuantSpec(format="int8"))),
        Rule(select="b", scheme=Scheme(weight=FP8, input=QuantSpec(format="mxfp4", dynamic=True))),
    )
    with pytest.raises(ConfigError, match="asks for int8"):
        graphq.prepare(Both().eval(), QuantConfig(rules=rules), (torch.randn(2, 64),), target="simulation")


@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_an_empty_batch_gives_an_empty_result(granularity):
    layer, x = nn.Linear(64, 8).eval(), torch.randn(4, 64)
    given = QuantSpec(format="int8", granularity=granularity, dynamic=True)
    graph = graphq.quantize(layer, config(FP8, given), [x], target="simulation", progress=False)
    assert graph(x[:0]).shape == (0, 8)


def test_int32_saturates_and_does_not_wrap():
    codes = quantize(
        torch.tensor([1.0, -1.0, 2.0]), torch.tensor(1 / (2**31 - 1)), torch.tensor(0), (), FORMATS["int32"]
    )
    assert codes[0] > 2**31 - 200 and codes[1] < -(2**31) + 200 and codes[2] == codes[0]


@pytest.mark.parametrize("part", ["input", "output"])
def test_a_part_of_a_scheme_alone_is_simulated(part):
    torch.manual_seed(0)
    model, x = nn.Linear(16, 8).eval(), torch.randn(4, 16)
    spec = QuantSpec(format="int4")
    config = QuantConfig(name="part", rules=(Rule(select="linear", scheme=Scheme(**{part: spec})),))
    simulated = graphq.quantize(model, config, [x], target="simulation", progress=False)

    def int4(t):
        scale = t.abs().max() / 7
        return (t / scale).round().clamp(-8, 7) * scale

    wanted = model(int4(x)) if part == "input" else int4(model(x))
    torch.testing.assert_close(simulated(x), wanted, rtol=0, atol=1e-6)
