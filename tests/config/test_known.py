"""Presets of other systems resolve to exactly the fields that their sources define, written out here."""

import pytest
import torch
from torch import nn

import graphq
from graphq.config import QuantConfig
from graphq.config.known import (
    KNOWN_CONFIGS,
    LLM_COMPRESSOR,
    MODELOPT,
    MODELOPT_ATTENTION,
    MODELOPT_MAMBA,
    MODELOPT_PARTS,
    QUARK,
    WITH_ALGORITHM,
)
from graphq.errors import ConfigError
from graphq.graph.view import layers as graph_layers

# format, granularity or group size, then what differs from: symmetric, static, float scale, range over the largest code
TOKEN8, TOKEN4 = "int8 token dynamic full", "int4 token dynamic full"
NV, NVL, NV32 = "fp4_e2m1 16 e4m3", "fp4_e2m1 16 e4m3 local", "fp4_e2m1 32 e4m3"
MX4, MX4D = "fp4_e2m1 32 e8m0", "fp4_e2m1 32 e8m0 dynamic"
MX6, MX6D = "fp6_e2m3 32 e8m0", "fp6_e2m3 32 e8m0 dynamic"
E3, E3D = "fp6_e3m2 32 e8m0", "fp6_e3m2 32 e8m0 dynamic"
MX8, MX8D = "fp8_e4m3 32 e8m0", "fp8_e4m3 32 e8m0 dynamic"
F8, F8C, F8T, F8G = "fp8_e4m3 tensor", "fp8_e4m3 channel", "fp8_e4m3 token dynamic", "fp8_e4m3 128 dynamic"
COMPRESSOR = {
    "UNQUANTIZED": (None, None),
    "W8A8": ("int8 channel full", TOKEN8), "INT8": ("int8 channel full", TOKEN8),
    "W2A16": ("int2 128 full", None), "W3A16": ("int3 128 full", None), "W4A16": ("int4 128 full", None),
    "W5A16": ("int5 128 full", None), "W6A16": ("int6 128 full", None), "W7A16": ("int7 128 full", None),
    "W8A16": ("int8 128 full", None),
    "W2A8": ("int2 128 full", TOKEN8), "W3A8": ("int3 128 full", TOKEN8), "W4A8": ("int4 128 full", TOKEN8),
    "W5A8": ("int5 128 full", TOKEN8), "W6A8": ("int6 128 full", TOKEN8), "W7A8": ("int7 128 full", TOKEN8),
    "W2A4": ("int2 128 full", TOKEN4), "W3A4": ("int3 128 full", TOKEN4), "W4A4": ("int4 128 full", TOKEN4),
    "W4A16_ASYM": ("int4 128 full affine", None), "W4AFP8": ("int4 128 full", F8T),
    "FP8": (F8, F8), "FP8_DYNAMIC": (F8C, F8T), "FP8_BLOCK": ("fp8_e4m3 128x128", F8G),
    "NVFP4A16": (NV, None), "NVFP4": (NV, NVL), "MXFP4A16": (MX4, None), "MXFP4": (MX4, MX4D),
    "MXFP4XFP8": (MX4, F8G),
    "MXFP6A16": (MX6, None), "MXFP6A8": (MX6, MX8D), "MXFP8A16": (MX8, None), "MXFP8": (MX8, MX8D),
}  # fmt: skip
NVIDIA = {
    "INT8_DEFAULT_CFG": ("int8 channel", "int8 tensor"), "INT8_WEIGHT_ONLY_CFG": ("int8 channel", None),
    "FP8_DEFAULT_CFG": (F8, F8), "FP8_PER_CHANNEL_PER_TOKEN_CFG": (F8C, F8T),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": ("fp8_e4m3 128x128", None),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": ("int4 128", None),
    "MXFP8_DEFAULT_CFG": (f"{MX8} cover", f"{MX8D} cover"), "MXFP6_DEFAULT_CFG": (f"{E3} cover", f"{E3D} cover"),
    "MXFP4_DEFAULT_CFG": (f"{MX4} cover", f"{MX4D} cover"), "W4A8_MXFP4_FP8_CFG": (f"{MX4} cover", F8),
    "MXINT8_DEFAULT_CFG": ("int8 32 e8m0 narrow cover", "int8 32 e8m0 narrow cover dynamic"),
    "NVFP4_DEFAULT_CFG": (NV, NVL), "W4A8_NVFP4_FP8_CFG": (NV32, F8), "W4A16_NVFP4_CFG": (NV, None),
}  # fmt: skip
AMD = {
    "int4_wo_32": ("int4 32 full", None), "int4_wo_64": ("int4 64 full", None), "int4_wo_128": ("int4 128 full", None),
    "int4_wo_per_channel": ("int4 channel full", None), "int4_wa_64": ("int4 64 full", "int4 64 full dynamic"),
    "uint4_wo_32": ("uint4 32 full affine", None), "uint4_wo_64": ("uint4 64 full affine", None),
    "uint4_wo_128": ("uint4 128 full affine", None), "uint4_wo_per_channel": ("uint4 channel full affine", None),
    "int8": ("int8 tensor full", "int8 tensor full"), "fp8": (F8, F8), "ptpc_fp8": (F8C, F8T),
    "mxfp4": (MX4, MX4D), "mxfp4_weight_only": (MX4, None), "mxfp6_e3m2": (E3, E3D), "mxfp6_e2m3": (MX6, MX6D),
    "mxfp4_mxfp6_e2m3": (MX4, MX6D), "mxfp4_fp8": (MX4, F8),
    "int4_fp8": ("fp8_e4m3 tensor then int4 channel full", "fp8_e4m3 tensor dynamic"),
    "mx6": ("mx6 16 e8m0 floor", "mx6 16 e8m0 floor dynamic"),
    "mx9": ("mx9 16 e8m0 floor", "mx9 16 e8m0 floor dynamic"),
    "bfp16": ("int8 8 bfp", "int8 8 bfp dynamic"), "nvfp4": (NV, NVL),
    "amdfp4": ("fp4_e2m1 16 e5m3", "fp4_e2m1 16 e5m3 dynamic"),
    "amdfp4_g32": ("fp4_e2m1 32 e5m3", "fp4_e2m1 32 e5m3 dynamic"),
    "amdfp4_global16": ("fp4_e2m1 16 e5m3_global", "fp4_e2m1 16 e5m3_global local"),
    "amdfp4_global32": ("fp4_e2m1 32 e5m3_global", "fp4_e2m1 32 e5m3_global local"),
    "fp4_block16_scale_e4m3": (NV, NVL),
}  # fmt: skip


def fields(text):
    """The fields that a line of the table stands for, all of them."""
    if text is None:
        return None
    first, _, then = text.partition(" then ")
    format, granularity, *flags = first.split()
    group = int(granularity) if granularity.isdigit() else None
    block = tuple(map(int, granularity.split("x"))) if "x" in granularity else None
    return {
        "format": format,
        "granularity": "group" if group else "block" if block else granularity,
        "group_size": group,
        "block": block,
        "symmetric": "affine" not in flags,
        "dynamic": "local" if "local" in flags else "dynamic" in flags,
        "scale": next((f for f in flags if f in ("e8m0", "e4m3", "bfp", "pof2", "e5m3", "e5m3_global")), "float"),
        "scale_mode": next((f for f in flags if f in ("floor", "cover")), "even"),
        "span": "full" if "full" in flags else "positive",
        "narrow_range": "narrow" in flags,
        "ragged": block is not None,
        "axis": None,
        "observer": "minmax",
        "observer_args": {},
        "rounding": "half_even",
        "saturate": True,
        "then": fields(then) if then else None,
    }


ROWS = [
    (table[n], written)
    for table, rows in ((LLM_COMPRESSOR, COMPRESSOR), (MODELOPT, NVIDIA), (QUARK, AMD))
    for n, written in rows.items()
]


@pytest.mark.parametrize(("scheme", "written"), ROWS, ids=[*COMPRESSOR, *NVIDIA, *AMD])
def test_a_preset_has_the_documented_fields(scheme, written):
    for spec, text in zip((scheme.weight, scheme.input), written, strict=True):
        assert (None if spec is None else spec.model_dump()) == fields(text)
    assert scheme.output is None


def test_no_preset_is_missing_from_the_table():
    assert set(LLM_COMPRESSOR) == set(COMPRESSOR)
    assert set(MODELOPT) == set(NVIDIA)
    assert set(QUARK) == set(AMD)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.lm_head = nn.Linear(256, 128), nn.Linear(128, 128)

    def forward(self, x):
        return self.lm_head(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    "name",
    sorted(n for n in KNOWN_CONFIGS if n not in ("UNQUANTIZED", *MODELOPT_PARTS, *MODELOPT_ATTENTION) and ":" not in n),
)
def test_every_preset_quantizes_a_model(name):
    torch.manual_seed(0)
    model, x = Tiny().eval(), torch.randn(4, 256)
    converted = graphq.quantize(model, name, [x], target="simulation", progress=False)
    actions = {row.layer: row.action for row in graphq.explain(converted).rows if row.op == "linear"}
    assert actions["up"] in ("quantize", "weight_only")
    assert actions["lm_head"] == (actions["up"] if name in (*LLM_COMPRESSOR, "NVFP4_FP8_MHA_CONFIG") else "float")
    assert not torch.equal(converted(x), model(x))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("name", "query", "cached"),
    [("FP8_KV_CFG", None, F8), ("NVFP4_KV_CFG", None, NVL), ("NVFP4_FP8_MHA_CONFIG", F8, F8)],
)
def test_presets_of_attention_quantize_what_enters_it(name, query, cached):
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(2, 8, 64)
    prepared = graphq.prepare(model, name, (x,), target="simulation")
    (attention,) = prepared.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    for node, text in zip(attention.args[:3], (query, cached, cached), strict=True):
        if text is None:
            assert node.op == "call_function"
        else:
            assert prepared.get_submodule(node.target).spec.model_dump() == fields(text)
    (linear,) = prepared.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    assert (linear.args[1].op == "call_module") == (name == "NVFP4_FP8_MHA_CONFIG")


def test_a_simulated_cache_is_keys_and_values_in_fp8():
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(2, 8, 64)
    simulated = graphq.quantize(model, "FP8_KV_CFG", [x], target="simulation", progress=False)
    q, k, v = model.qkv(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)

    def fp8(t):
        scale = t.abs().max() / 448
        return (t / scale).to(torch.float8_e4m3fn).float() * scale

    wanted = nn.functional.scaled_dot_product_attention(q, fp8(k), fp8(v))
    torch.testing.assert_close(simulated(x), wanted, rtol=0, atol=2e-6)
    assert (wanted - model(x)).abs().max() > 1e-4


def test_every_name_of_modelopt_resolves_or_says_what_it_stands_for():
    for name, (preset, _) in WITH_ALGORITHM.items():
        with pytest.raises(ConfigError, match=name) as error:
            QuantConfig.load(name)
        assert preset in error.value.remedy
        QuantConfig.load(preset)


@pytest.mark.parametrize(("name", "weight", "given"), [("FP8", F8, F8), ("NVFP4", NV, NVL)])
@pytest.mark.parametrize(("how", "mixer"), [("AGGRESSIVE", True), ("CONSERVATIVE", False)])
def test_mamba_configs_leave_attention_and_perhaps_the_mixer_float(name, weight, given, how, mixer):
    assert len(MODELOPT_MAMBA) == 4
    config = QuantConfig.load(f"MAMBA_MOE_{name}_{how}_CFG")
    graph = graphq.capture(Mixed().eval(), (torch.randn(2, 64),))
    schemes = {v.path: config.resolve(v).scheme for v in graph_layers(graph) if v.family == "linear"}
    wanted = {"layer.mixer.up_proj", *(("layer.mixer.in_proj", "layer.mixer.out_proj") if mixer else ())}
    assert {path for path, scheme in schemes.items() if scheme} == wanted
    for scheme in filter(None, schemes.values()):
        assert scheme.weight.model_dump() == fields(weight)
        assert scheme.input.model_dump() == fields(given)


class Mixed(nn.Module):
    """The names that ModelOpt's configs for Mamba look for."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj, self.fc1_latent_proj, self.lm_head = (nn.Linear(64, 64) for _ in range(4))
        mixer = nn.ModuleDict({n: nn.Linear(64, 64) for n in ("in_proj", "up_proj", "out_proj")})
        self.layer = nn.ModuleDict({"mixer": mixer})

    def forward(self, x):
        x = self.fc1_latent_proj(self.o_proj(self.q_proj(x)))
        for linear in self.layer["mixer"].values():
            x = linear(x)
        return self.lm_head(x)


def test_a_name_that_is_ours_too_needs_its_prefix():
    assert QuantConfig.load("int8").rules[0].scheme != QuantConfig.load("quark:int8").rules[0].scheme


class Layered(nn.Module):
    """The names that ModelOpt's partial configs look for."""

    def __init__(self):
        super().__init__()
        self.o_proj, self.mlp, self.block_sparse_moe = (nn.Linear(64, 64) for _ in range(3))
        self.moe = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(64, 64)])})
        self.mixer = nn.ModuleDict({"up_proj": nn.Linear(64, 64)})
        self.layer = nn.ModuleDict({"mixer": nn.ModuleDict({"up_proj": nn.Linear(64, 64)})})
        self.other, self.mlp_lm_head = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        x = self.block_sparse_moe(self.mlp(self.o_proj(x)))
        x = self.layer["mixer"]["up_proj"](self.moe["experts"][0](x))
        return self.mlp_lm_head(self.other(x))


@pytest.mark.parametrize(
    ("name", "layers", "weight", "given"),
    [
        ("NVFP4_MLP_ONLY_CFG", {"mlp", "block_sparse_moe", "moe.experts.0", "layer.mixer.up_proj"}, NV, NVL),
        ("NVFP4_OMLP_ONLY_CFG", {"o_proj", "mlp", "block_sparse_moe", "layer.mixer.up_proj"}, NV, NVL),
        ("NVFP4_EXPERTS_ONLY_CFG", {"block_sparse_moe", "moe.experts.0"}, NV, NVL),
        ("NVFP4_MLP_WEIGHT_ONLY_CFG", {"mlp", "block_sparse_moe"}, NV32, None),
        ("MXFP4_MLP_WEIGHT_ONLY_CFG", {"mlp", "block_sparse_moe"}, f"{MX4} cover", None),
    ],
)
def test_partial_configs_choose_their_layers_and_never_the_head(name, layers, weight, given):
    config = QuantConfig.load(name)
    graph = graphq.capture(Layered().eval(), (torch.randn(2, 64),))
    schemes = {v.path: config.resolve(v).scheme for v in graph_layers(graph) if v.family == "linear"}
    assert {path for path, scheme in schemes.items() if scheme} == layers
    for scheme in filter(None, schemes.values()):
        for spec, text in ((scheme.weight, weight), (scheme.input, given)):
            assert (None if spec is None else spec.model_dump()) == fields(text)
