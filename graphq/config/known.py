"""Schemes and configs by the names that users of other systems know; data only.

    W4A16, FP8_DYNAMIC, NVFP4, …             llm-compressor (compressed-tensors 0.20), in upper case
    INT8_DEFAULT_CFG, NVFP4_DEFAULT_CFG, …   NVIDIA ModelOpt 0.47
    int4_wo_128, mxfp4, ptpc_fp8, …          AMD Quark 0.13, also as "quark:mxfp4"; where a name is ours too, only so

llm-compressor and Quark divide a symmetric range by half of all codes (span "full": int8 by 127.5, int4 by 7.5),
ModelOpt by the largest code (127, 7). E8M0 exponents are "even" in the first two, "cover" in ModelOpt.
"""

from __future__ import annotations

from typing import Any

from graphq.config.config import Algorithm, QuantConfig, Rule
from graphq.config.scheme import Scheme
from graphq.config.spec import QuantSpec

LAYERS = "linear | conv | conv_transpose"


def _full(format: str, granularity: str, **more: Any) -> QuantSpec:
    return QuantSpec.model_validate({"format": format, "granularity": granularity, "span": "full", **more})


def _group(format: str, size: int = 128, **more: Any) -> QuantSpec:
    return _full(format, "group", group_size=size, **more)


FP8 = QuantSpec(format="fp8_e4m3")
FP8_CHANNEL = QuantSpec(format="fp8_e4m3", granularity="channel")
FP8_TOKEN = QuantSpec(format="fp8_e4m3", granularity="token", dynamic=True)
FP8_GROUP = QuantSpec(format="fp8_e4m3", granularity="group", group_size=128, dynamic=True)
INT8_TOKEN = _full("int8", "token", dynamic=True)
NVFP4 = QuantSpec(format="nvfp4")
NVFP4_LOCAL = QuantSpec(format="nvfp4", dynamic="local")
MXFP4, MXFP4_DYNAMIC = QuantSpec(format="mxfp4"), QuantSpec(format="mxfp4", dynamic=True)
MXFP6, MXFP6_DYNAMIC = QuantSpec(format="mxfp6_e2m3"), QuantSpec(format="mxfp6_e2m3", dynamic=True)
MXFP8, MXFP8_DYNAMIC = QuantSpec(format="mxfp8_e4m3"), QuantSpec(format="mxfp8_e4m3", dynamic=True)
E3M2, E3M2_DYNAMIC = QuantSpec(format="mxfp6_e3m2"), QuantSpec(format="mxfp6_e3m2", dynamic=True)


LLM_COMPRESSOR: dict[str, Scheme] = {
    "UNQUANTIZED": Scheme(),
    "W8A8": Scheme(weight=_full("int8", "channel"), input=INT8_TOKEN),
    "INT8": Scheme(weight=_full("int8", "channel"), input=INT8_TOKEN),
    **{f"W{n}A16": Scheme(weight=_group(f"int{n}")) for n in range(2, 9)},
    **{f"W{n}A8": Scheme(weight=_group(f"int{n}"), input=INT8_TOKEN) for n in range(2, 8)},
    **{f"W{n}A4": Scheme(weight=_group(f"int{n}"), input=_full("int4", "token", dynamic=True)) for n in range(2, 5)},
    "W4A16_ASYM": Scheme(weight=_group("int4", symmetric=False)),
    "W4AFP8": Scheme(weight=_group("int4"), input=FP8_TOKEN),
    "FP8": Scheme(weight=FP8, input=FP8),
    "FP8_DYNAMIC": Scheme(weight=FP8_CHANNEL, input=FP8_TOKEN),
    "FP8_BLOCK": Scheme(
        weight=QuantSpec(format="fp8_e4m3", granularity="block", block=(128, 128), ragged=True), input=FP8_GROUP
    ),
    "NVFP4A16": Scheme(weight=NVFP4),
    "NVFP4": Scheme(weight=NVFP4, input=NVFP4_LOCAL),
    "MXFP4A16": Scheme(weight=MXFP4),
    "MXFP4": Scheme(weight=MXFP4, input=MXFP4_DYNAMIC),
    "MXFP4XFP8": Scheme(weight=MXFP4, input=FP8_GROUP),
    "MXFP6A16": Scheme(weight=MXFP6),
    "MXFP6A8": Scheme(weight=MXFP6, input=MXFP8_DYNAMIC),
    "MXFP8A16": Scheme(weight=MXFP8),
    "MXFP8": Scheme(weight=MXFP8, input=MXFP8_DYNAMIC),
}

_INT4_BLOCK = QuantSpec(format="int4", granularity="group", group_size=128)
_INT8_CHANNEL = QuantSpec(format="int8", granularity="channel")


def _cover(format: str, dynamic: bool = False) -> QuantSpec:
    return QuantSpec.model_validate({"format": format, "scale_mode": "cover", "dynamic": dynamic})


MODELOPT: dict[str, Scheme] = {
    "INT8_DEFAULT_CFG": Scheme(weight=_INT8_CHANNEL, input=QuantSpec(format="int8")),
    "INT8_WEIGHT_ONLY_CFG": Scheme(weight=_INT8_CHANNEL),
    "FP8_DEFAULT_CFG": Scheme(weight=FP8, input=FP8),
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": Scheme(weight=FP8_CHANNEL, input=FP8_TOKEN),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": Scheme(
        weight=QuantSpec(format="fp8_e4m3", granularity="block", block=(128, 128), ragged=True)
    ),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": Scheme(weight=_INT4_BLOCK),
    "MXFP8_DEFAULT_CFG": Scheme(weight=_cover("mxfp8_e4m3"), input=_cover("mxfp8_e4m3", dynamic=True)),
    "MXFP6_DEFAULT_CFG": Scheme(weight=_cover("mxfp6_e3m2"), input=_cover("mxfp6_e3m2", dynamic=True)),
    "MXFP4_DEFAULT_CFG": Scheme(weight=_cover("mxfp4"), input=_cover("mxfp4", dynamic=True)),
    "MXINT8_DEFAULT_CFG": Scheme(weight=_cover("mxint8"), input=_cover("mxint8", dynamic=True)),
    "W4A8_MXFP4_FP8_CFG": Scheme(weight=_cover("mxfp4"), input=FP8),
    "NVFP4_DEFAULT_CFG": Scheme(weight=NVFP4, input=NVFP4_LOCAL),
    "W4A8_NVFP4_FP8_CFG": Scheme(weight=QuantSpec(format="nvfp4", group_size=32), input=FP8),
    "W4A16_NVFP4_CFG": Scheme(weight=NVFP4),
}
MODELOPT_FLOAT = (
    "*block_sparse_moe.gate*", "*linear_attn.conv1d*", "*self_attention.conv1d*", "*linear_attn.in_proj_a*",
    "*linear_attn.in_proj_b*", "*lm_head*", "*mixer.conv1d*", "*mlp.gate.*", "*mlp.gate", "*mlp.shared_expert_gate*",
    "*output_layer*", "*proj_out*", "*router*", "mtp.*", "output", "*embed_vision*", "*vision_tower*", "*visual*",
    "*vision_model*", "*multi_modal_projector*", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LeakyReLU", "Embedding",
)  # fmt: skip


def _amdfp4(size: int, kind: str, dynamic: bool | str) -> Scheme:
    fields = {"format": "fp4_e2m1", "granularity": "group", "group_size": size, "scale": kind}
    return Scheme(
        weight=QuantSpec.model_validate(fields), input=QuantSpec.model_validate({**fields, "dynamic": dynamic})
    )


_INT8_TENSOR = _full("int8", "tensor")
_BFP16, _BFP16_DYNAMIC = QuantSpec(format="bfp16"), QuantSpec(format="bfp16", dynamic=True)
QUARK: dict[str, Scheme] = {
    **{f"int4_wo_{g}": Scheme(weight=_group("int4", g)) for g in (32, 64, 128)},
    "int4_wo_per_channel": Scheme(weight=_full("int4", "channel")),
    "int4_wa_64": Scheme(weight=_group("int4", 64), input=_group("int4", 64, dynamic=True)),
    **{f"uint4_wo_{g}": Scheme(weight=_group("uint4", g, symmetric=False)) for g in (32, 64, 128)},
    "uint4_wo_per_channel": Scheme(weight=_full("uint4", "channel", symmetric=False)),
    "int8": Scheme(weight=_INT8_TENSOR, input=_INT8_TENSOR),
    "fp8": Scheme(weight=FP8, input=FP8),
    "ptpc_fp8": Scheme(weight=FP8_CHANNEL, input=FP8_TOKEN),
    "mxfp4": Scheme(weight=MXFP4, input=MXFP4_DYNAMIC),
    "mxfp4_weight_only": Scheme(weight=MXFP4),
    "mxfp6_e3m2": Scheme(weight=E3M2, input=E3M2_DYNAMIC),
    "mxfp6_e2m3": Scheme(weight=MXFP6, input=MXFP6_DYNAMIC),
    "mxfp4_mxfp6_e2m3": Scheme(weight=MXFP4, input=MXFP6_DYNAMIC),
    "mxfp4_fp8": Scheme(weight=MXFP4, input=FP8),
    "int4_fp8": Scheme(
        weight=QuantSpec(format="fp8_e4m3", then=_full("int4", "channel")),
        input=QuantSpec(format="fp8_e4m3", dynamic=True),
    ),
    "mx6": Scheme(weight=QuantSpec(format="mx6"), input=QuantSpec(format="mx6", dynamic=True)),
    "mx9": Scheme(weight=QuantSpec(format="mx9"), input=QuantSpec(format="mx9", dynamic=True)),
    "bfp16": Scheme(weight=_BFP16, input=_BFP16_DYNAMIC),
    **{n: _amdfp4(s, "e5m3", True) for n, s in (("amdfp4", 16), ("amdfp4_g32", 32))},
    **{f"amdfp4_global{s}": _amdfp4(s, "e5m3_global", "local") for s in (16, 32)},
    "nvfp4": Scheme(weight=NVFP4, input=NVFP4_LOCAL),
    "fp4_block16_scale_e4m3": Scheme(weight=NVFP4, input=NVFP4_LOCAL),
}


_MIXER, _MOE = ("*.mixer.up_proj", "*.mixer.down_proj"), "*block_sparse_moe*"
_NVFP4 = MODELOPT["NVFP4_DEFAULT_CFG"]
MODELOPT_PARTS: dict[str, tuple[tuple[str, ...], Scheme]] = {  # name → globs of the linears, scheme
    "NVFP4_MLP_ONLY_CFG": (("*mlp*", *_MIXER, _MOE, "*.experts.*"), _NVFP4),
    "NVFP4_OMLP_ONLY_CFG": (("*o_proj*", "*mlp*", *_MIXER, _MOE), _NVFP4),
    "NVFP4_EXPERTS_ONLY_CFG": ((_MOE, "*.experts.*"), _NVFP4),
    "NVFP4_MLP_WEIGHT_ONLY_CFG": (("*mlp*", _MOE), Scheme(weight=QuantSpec(format="nvfp4", group_size=32))),
    "MXFP4_MLP_WEIGHT_ONLY_CFG": (("*mlp*", _MOE), Scheme(weight=_cover("mxfp4"))),
}

_MAMBA_FLOAT = ("*fc1_latent_proj*", "*fc2_latent_proj*", "*q_proj*", "*k_proj*", "*v_proj*", "*o_proj*",
                "*self_attention.linear_qkv*", "*self_attention.linear_proj*")  # fmt: skip
_MAMBA_CONSERVATIVE = (*_MAMBA_FLOAT, "*mixer.in_proj*", "*mixer.out_proj*")
MODELOPT_MAMBA: dict[str, tuple[Scheme, tuple[str, ...]]] = {  # name → scheme of all layers, globs that stay float
    f"MAMBA_MOE_{name}_{how}_CFG": (MODELOPT[f"{name}_DEFAULT_CFG"], floats)
    for name in ("FP8", "NVFP4")
    for how, floats in (("AGGRESSIVE", _MAMBA_FLOAT), ("CONSERVATIVE", _MAMBA_CONSERVATIVE))
}
MODELOPT_ATTENTION: dict[str, Scheme] = {  # what enters attention; layers stay float
    "FP8_KV_CFG": Scheme(cache=FP8),
    "NVFP4_KV_CFG": Scheme(cache=NVFP4_LOCAL),
}

# ModelOpt's names for a format together with a weight algorithm: the preset of the format, and the algorithm
WITH_ALGORITHM = {
    "NVFP4_AWQ_CLIP_CFG": ("NVFP4_DEFAULT_CFG", "AWQ with clipped ranges"),
    "NVFP4_AWQ_FULL_CFG": ("NVFP4_DEFAULT_CFG", "AWQ with clipped ranges"),
    "W4A8_AWQ_BETA_CFG": ("W4AFP8", "AWQ and static fp8 inputs"),
    "NVFP4_SVDQUANT_DEFAULT_CFG": ("NVFP4_DEFAULT_CFG", "SVDQuant"),
    "NVFP4_FOUR_OVER_SIX_CFG": ("NVFP4_DEFAULT_CFG", "Four over Six"),
    "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG": ("NVFP4_DEFAULT_CFG", "local Hessian"),
    "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG": ("NVFP4_DEFAULT_CFG", "MSE sweep of the block scales"),
    "FP8_AFFINE_KV_CFG": ("FP8_KV_CFG", "affine keys and values"),
    "NVFP4_AFFINE_KV_CFG": ("NVFP4_KV_CFG", "affine keys and values"),
    "NVFP4_KV_ROTATE_CFG": ("NVFP4_KV_CFG", "rotation of keys"),
}


# ModelOpt's names of a format and an algorithm, which is searched for here: format, algorithm
PREPARED = {
    "INT8_SMOOTHQUANT_CFG": ("INT8_DEFAULT_CFG", "smoothquant"),
    "INT4_AWQ_CFG": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "awq"),
    "NVFP4_AWQ_LITE_CFG": ("NVFP4_DEFAULT_CFG", "awq"),
}


def _config(name: str, select: str, scheme: Scheme, floats: tuple[str, ...], source: str) -> QuantConfig:
    why = f"{source} leaves it float"
    kept = tuple(Rule(select=s, scheme=None, optional=True, reason=why) for s in floats)
    return QuantConfig(name=name, rules=(Rule(select=select, scheme=scheme), *kept))


KNOWN_SCHEMES: dict[str, Scheme] = {
    **{f"quark:{n}": s for n, s in QUARK.items()},
    **{n: s for n, s in QUARK.items() if n != "int8"},  # that name is ours
    **LLM_COMPRESSOR,
    **MODELOPT,
}
KNOWN_CONFIGS: dict[str, QuantConfig] = {
    n: _config(n, LAYERS, s, MODELOPT_FLOAT, "ModelOpt")
    if n in MODELOPT
    else _config(n, "Linear", s, (), "")
    if n in LLM_COMPRESSOR
    else _config(n, LAYERS, s, ("*lm_head",), "Quark's templates")
    for n, s in KNOWN_SCHEMES.items()
}
KNOWN_CONFIGS |= {
    name: _config(name, " | ".join(f"linear & {glob}" for glob in globs), scheme, MODELOPT_FLOAT, "ModelOpt")
    for name, (globs, scheme) in MODELOPT_PARTS.items()
}
KNOWN_CONFIGS |= {
    name: _config(name, LAYERS, scheme, (*MODELOPT_FLOAT, *floats), "ModelOpt")
    for name, (scheme, floats) in MODELOPT_MAMBA.items()
}
KNOWN_CONFIGS |= {name: _config(name, "attention", scheme, (), "") for name, scheme in MODELOPT_ATTENTION.items()}
KNOWN_CONFIGS["NVFP4_FP8_MHA_CONFIG"] = QuantConfig(
    name="NVFP4_FP8_MHA_CONFIG",
    rules=(Rule(select=LAYERS, scheme=_NVFP4), Rule(select="attention", scheme=Scheme(input=FP8), optional=True)),
)
KNOWN_CONFIGS |= {
    name: KNOWN_CONFIGS[form].model_copy(update={"name": name, "algorithms": (Algorithm(name=algorithm),)})
    for name, (form, algorithm) in PREPARED.items()
}
