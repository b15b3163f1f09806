"""Configs of other systems keep their source's precedence, and what has no counterpart is an error."""

import pytest
import torch
from torch import nn

import graphq
from graphq.config import QuantConfig, QuantSpec
from graphq.config.known import LLM_COMPRESSOR, MODELOPT
from graphq.errors import ConfigError
from graphq.graph.view import layers


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.mlp, self.lm_head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.mlp(x))


ORDER = ["layers.0.q_proj", "layers.0.k_proj", "layers.1.q_proj", "layers.1.k_proj", "mlp", "lm_head"]


@pytest.fixture(scope="module")
def views():
    return {v.path: v for v in layers(graphq.capture(Net(), (torch.randn(2, 32),))) if v.family == "linear"}


def formats(config, views, part="weight"):
    """path → format of a tensor of the layer, None where it stays float."""
    schemes = {path: config.resolve(v).scheme for path, v in views.items()}
    specs = {path: s and getattr(s, part) for path, s in schemes.items()}
    return {path: s and s.format for path, s in specs.items()}


def test_in_config_groups_names_beat_regexes_beat_classes_then_the_first_group(views):
    def group(bits, *targets):
        return {"targets": list(targets), "weights": {"num_bits": bits, "group_size": 16}}

    config = QuantConfig.from_config_groups(
        {
            "name": group(2, "layers.0.q_proj"),
            "first": group(3, "re:.*q_proj"),
            "second": group(5, "re:.*_proj"),
            "class": group(8, "Linear"),
            "late": group(7, "Linear"),
        },
        ignore=["lm_head", "re:not_there.*"],
    )
    assert formats(config, views) == {
        "layers.0.q_proj": "int2", "layers.1.q_proj": "int3", "layers.0.k_proj": "int5", "layers.1.k_proj": "int5",
        "mlp": "int8", "lm_head": None,
    }  # fmt: skip
    assert "name beats regex beats class" in config.resolve(views["mlp"]).because


def test_config_groups_take_presets_and_full_arguments(views):
    config = QuantConfig.from_config_groups({"W4A16": ["re:.*q_proj"], "FP8_DYNAMIC": ["mlp"]})
    assert config.resolve(views["layers.0.q_proj"]).scheme == LLM_COMPRESSOR["W4A16"]
    assert config.resolve(views["mlp"]).scheme == LLM_COMPRESSOR["FP8_DYNAMIC"]
    assert config.resolve(views["lm_head"]).scheme is None
    nvfp4 = {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    config = QuantConfig.from_config_groups(
        {"g": {"targets": ["Linear"], "weights": nvfp4, "input_activations": {**nvfp4, "dynamic": "local"}}}
    )
    assert config.resolve(views["mlp"]).scheme == LLM_COMPRESSOR["NVFP4"]


def test_a_kv_cache_scheme_is_of_what_enters_attention():
    args = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config = QuantConfig.from_config_groups({"FP8": ["Linear"]}, kv_cache_scheme=args)
    rule = config.rules[-1]
    assert (rule.select, rule.scheme.cache.format, rule.scheme.input) == ("attention", "fp8_e4m3", None)


def test_regular_expressions_match_the_beginning_as_there(views):
    config = QuantConfig.from_config_groups({"W4A16": ["re:layers.0"]})
    assert formats(config, views)["layers.0.k_proj"] == "int4"
    assert formats(config, views)["layers.1.k_proj"] is None


MODELOPT_LIST = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": "e4m3", "axis": None}},
        {"quantizer_name": "*mlp*weight_quantizer",
         "cfg": {"num_bits": "e2m1", "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": "e4m3"}}},
        {"quantizer_name": "*k_proj.input_quantizer", "enable": False},
        {"quantizer_name": "*lm_head*", "enable": False},
    ],
    "algorithm": "max",
}  # fmt: skip
MODELOPT_DICT = {
    "quant_cfg": {
        "*weight_quantizer": {"num_bits": 8, "axis": 0},
        "*input_quantizer": {"num_bits": (4, 3), "axis": None},
        "*mlp*weight_quantizer": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
        "*k_proj.input_quantizer": {"enable": False},
        "*lm_head*": {"enable": False},
        "default": {"enable": False},
    },
    "algorithm": {"method": "max"},
}


@pytest.mark.parametrize("source", [MODELOPT_LIST, MODELOPT_DICT], ids=["list", "dict"])
def test_in_modelopt_the_last_entry_wins_quantizer_by_quantizer(views, source):
    config = QuantConfig.from_modelopt(source)
    weights, inputs = formats(config, views), formats(config, views, "input")
    assert weights == {**dict.fromkeys(ORDER, "int8"), "mlp": "fp4_e2m1", "lm_head": None}
    proj = {p: "fp8_e4m3" if "q_proj" in p else None for p in ORDER[:4]}
    assert inputs == {**proj, "mlp": "fp8_e4m3", "lm_head": None}
    assert "last entry wins" in config.resolve(views["mlp"]).because
    assert config.resolve(views["mlp"]).scheme.weight == QuantSpec(format="nvfp4")


def test_the_older_dict_with_classes_and_sequences(views):
    config = QuantConfig.from_modelopt(
        {
            "quant_cfg": {
                "nn.Linear": {"*": {"enable": False}},
                "*weight_quantizer": [{"num_bits": 4, "block_sizes": {-1: 16}}, {"num_bits": (4, 3)}],
                "default": {"enable": False},
            }
        }
    )
    spec = config.resolve(views["mlp"]).scheme.weight
    assert (spec.format, spec.group_size, spec.then.format) == ("int4", 16, "fp8_e4m3")


def test_modelopt_presets_equal_their_definition():
    fp8 = {"num_bits": "e4m3"}
    entries = [
        {"quantizer_name": "*weight_quantizer", "cfg": {**fp8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {**fp8, "type": "dynamic", "block_sizes": {-1: None}}},
    ]
    config = QuantConfig.from_modelopt({"quant_cfg": entries, "algorithm": "max"})
    weight = config.rules[0].scheme.weight
    assert weight.axis == 0  # where the output channels of a linear are
    assert weight.model_copy(update={"axis": None}) == MODELOPT["FP8_PER_CHANNEL_PER_TOKEN_CFG"].weight
    assert config.rules[1].scheme.input == MODELOPT["FP8_PER_CHANNEL_PER_TOKEN_CFG"].input


def test_in_quark_exclude_beats_layer_beats_type_beats_global(views):
    def layer(dtype, **more):
        return {"weight": {"dtype": dtype, "qscheme": "per_tensor", "symmetric": True, **more}}

    config = QuantConfig.from_quark(
        {
            "global_quant_config": layer("int8"),
            "layer_type_quant_config": {nn.Linear: layer("int4")},
            "layer_quant_config": {"*q_proj": layer("Dtype.fp8_e4m3"), "lm_head": layer("int8", round_method="floor")},
            "exclude": ["lm_head", "layers.1.*"],
            "algo_config": None,
        }
    )
    assert formats(config, views) == {
        "layers.0.q_proj": "fp8_e4m3", "layers.0.k_proj": "int4", "layers.1.q_proj": None, "layers.1.k_proj": None,
        "mlp": "int4", "lm_head": None,
    }  # fmt: skip
    assert "exclude beats layer" in config.resolve(views["mlp"]).because


def test_quark_specs_keep_every_field():
    from graphq.config.imports.quark import spec_of

    assert spec_of({"dtype": "int4", "qscheme": "QSchemeType.per_group", "group_size": 32, "ch_axis": -1,
                    "symmetric": False, "round_method": "RoundType.round"}) == QuantSpec(
        format="int4", symmetric=False, granularity="group", group_size=32, axis=-1, rounding="half_away"
    )  # fmt: skip
    mx = {"dtype": "mx", "mx_element_dtype": "fp6_e3m2", "is_dynamic": True, "scale_calculation_mode": "floor"}
    assert spec_of(mx) == QuantSpec(format="mxfp6_e3m2", dynamic=True, scale_mode="floor")
    assert spec_of({"dtype": "uint8", "symmetric": False, "scale_type": "pof2"}).scale == "pof2"


def test_onecomp_applies_its_filters_and_counts_layers_in_order(views):
    config = QuantConfig.from_onecomp(include_layer_keywords=["proj", "head"], exclude_layer_keywords=["k_proj"])
    assert {p for p, f in formats(config, views).items() if f} == {"layers.0.q_proj", "layers.1.q_proj"}
    config = QuantConfig.from_onecomp(include_layer_names=["mlp", "lm_head"], groupsize=16)
    assert {p for p, f in formats(config, views).items() if f} == {"mlp"}
    config = QuantConfig.from_onecomp(num_layers=3, layers=ORDER)
    assert [p for p in ORDER if formats(config, views)[p]] == ORDER[:3]
    with pytest.raises(ConfigError, match="filters leave 5 layers"):
        QuantConfig.from_onecomp(num_layers=6, layers=ORDER)


def test_ticos_deepest_override_wins(views):
    config = QuantConfig.from_tico(
        {
            "activation": {"dtype": "int16"},
            "weight": {"dtype": "uint8"},
            "overrides": {
                "layers": {"weight": {"dtype": "int8"}, "0": {"q_proj": {"weight": {"dtype": "uint4"}}}},
                "layers.1.act_in": "no_quant",
                "mlp.act_out": {"dtype": "uint8"},
            },
        }
    )
    assert formats(config, views) == {
        "layers.0.q_proj": "uint4", "layers.0.k_proj": "int8", "layers.1.q_proj": "int8", "layers.1.k_proj": "int8",
        "mlp": "uint8", "lm_head": "uint8",
    }  # fmt: skip
    assert formats(config, views, "input")["layers.1.q_proj"] is None
    assert formats(config, views, "output") == {**dict.fromkeys(ORDER), "mlp": "uint8"}


QKV = {"prev_op": "input_layernorm", "layers": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
ENTRIES = {"scaling_layers": [QKV], "model_decoder_layers": "model.layers"}


@pytest.mark.parametrize(
    ("given", "name", "args"),
    [
        ({"name": "awq", **ENTRIES}, "awq", {"grid": 20, "duo": False, **ENTRIES}),
        ({"name": "smooth", "alpha": 0.5, "scale_clamp_min": 0.001}, "smoothquant", {"alpha": 0.5}),
        ("autosmoothquant", "smoothquant", {}),
        ({"name": "gptq", "damp_percent": 0.02, "desc_act": False, "static_groups": False, "inside_layer_modules": []},
         "gptq", {"damping": 0.02, "order": "none", "groups": "dynamic"}),
    ],
)  # fmt: skip
def test_algorithms_of_quark_are_ours_by_its_words(given, name, args):
    config = QuantConfig.from_quark({"algo_config": given})
    assert [(a.name, a.args) for a in config.algorithms] == [(name, args)]
    assert QuantConfig.from_quark({"algo_config": [given]}).algorithms == config.algorithms


def test_groups_that_are_scattered_by_quarks_order_are_refused_when_they_are_read():
    with pytest.raises(ConfigError, match="static_groups"):
        QuantConfig.from_quark({"algo_config": {"name": "gptq", "desc_act": True, "static_groups": False}})


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("max", []),
        (None, []),
        ("smoothquant", [("smoothquant", {"alpha": 1.0})]),
        ({"method": "awq_lite", "alpha_step": 0.05}, [("awq", {"grid": 20, "duo": False})]),
        (["max", {"method": "gptq", "percdamp": 0.1}], [("gptq", {"damping": 0.1})]),
    ],
)
def test_algorithms_of_modelopt_are_ours_by_its_words(given, wanted):
    config = QuantConfig.from_modelopt({"quant_cfg": [], "algorithm": given})
    assert [(a.name, a.args) for a in config.algorithms] == wanted


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda: QuantConfig.from_config_groups({"W4A17": ["Linear"]}), "unknown preset"),
        (lambda: QuantConfig.from_config_groups({"g": {"target": ["Linear"]}}), "'target'"),
        (lambda: QuantConfig.from_config_groups({"g": {"weights": {"num_bits": 5, "type": "float"}}}), "5 bits"),
        (lambda: QuantConfig.from_config_groups({"g": {"weights": {"actorder": "static"}}}), "GPTQ"),
        (lambda: QuantConfig.from_modelopt({"quant_cfg": [], "algorithm": "awq_clip"}), "imatrix_mse"),
        (lambda: QuantConfig.from_modelopt({"quant_cfg": [], "algorithm": {"method": "gptq", "x": 1}}), "'x'"),
        (lambda: QuantConfig.from_modelopt({"quant_cfg": [], "algorithm": {"method": "max", "x": 1}}), "'x'"),
        (lambda: QuantConfig.from_modelopt({"quant_cfg": {"*[kv]_bmm_quantizer": {"num_bits": 8}}}), "attention"),
        (lambda: QuantConfig.from_modelopt({"quant_cfg": {"*weight_quantizer": {"bits": 8}}}), "'bits'"),
        (lambda: QuantConfig.from_quark({"global_quant_config": {"weight": {"dtype": "fp8_e5m3"}}}), "fp8_e5m3"),
        (
            lambda: QuantConfig.from_modelopt({"quant_cfg": [], "algorithm": {"method": "awq_lite", "alpha_step": 0}}),
            "no grid",
        ),
        (lambda: QuantConfig.from_quark({"algo_config": {"name": "rotation"}}), "rotation"),
        (lambda: QuantConfig.from_quark({"algo_config": {"name": "smooth", "scale_clamp_min": 0.1}}), "lower bound"),
        (lambda: QuantConfig.from_quark({"algo_config": {"name": "gptq", "true_sequential": False}}), "rounded layers"),
        (lambda: QuantConfig.from_quark({"algo_config": [{"name": "gptq", "beta": 1}]}), "'beta'"),
        (lambda: QuantConfig.from_onecomp(num_layers=2), "counts layers"),
        (lambda: QuantConfig.from_tico({"weight": {"dtype": "uint8", "qscheme": "per_tensor_symm"}}), "asymmetric"),
        (lambda: QuantConfig.from_tico({"overrides": {"mlp": {"wait": {"dtype": "int8"}}}}), "no tensor"),
    ],
)
def test_what_has_no_counterpart_is_an_error(build, complaint):
    with pytest.raises(ConfigError, match=complaint):
        build()
