"""Named schemes and configs: our own here, those of other systems in `graphq.config.known`."""

from __future__ import annotations

from graphq.config.config import Algorithm, QuantConfig, Rule
from graphq.config.known import KNOWN_CONFIGS, KNOWN_SCHEMES
from graphq.config.scheme import Scheme
from graphq.config.spec import QuantSpec

WEIGHT_INT8 = QuantSpec(format="int8", symmetric=True, granularity="channel", narrow_range=True)
ACTIVATION_UINT8 = QuantSpec(format="uint8", symmetric=False, granularity="tensor", observer="mse")

ACTIVATION_TOKEN = QuantSpec(format="int8", granularity="token", dynamic=True)
ACTIVATION_DYNAMIC = QuantSpec(format="uint8", symmetric=False, granularity="tensor", dynamic=True)

SCHEMES: dict[str, Scheme] = {
    **KNOWN_SCHEMES,
    "int8": Scheme(weight=WEIGHT_INT8, input=ACTIVATION_UINT8),
    "int8_weight_only": Scheme(weight=WEIGHT_INT8),
    "int8_dynamic": Scheme(weight=WEIGHT_INT8, input=ACTIVATION_DYNAMIC),
    "int8_dynamic_token": Scheme(weight=WEIGHT_INT8, input=ACTIVATION_TOKEN),
    "float": Scheme(),
}

WEIGHT_INT4 = QuantSpec(format="uint4", symmetric=False, granularity="group", group_size=64, observer="mse_grid")
WEIGHT_INT4_SEEN = WEIGHT_INT4.model_copy(update={"observer": "imatrix_mse"})  # by what its inputs are


def _int4_linears(linears: QuantSpec, experts: QuantSpec) -> tuple[Rule, ...]:
    tables = Scheme(weight=WEIGHT_INT8)
    return (
        Rule(select="linear", scheme=Scheme(weight=linears)),
        Rule(select="experts", scheme=Scheme(weight=experts), optional=True),
        Rule(select="embedding | *lm_head", scheme=tables, optional=True, reason="tables and heads"),
    )


FLOAT_MATMUL = Rule(
    select="matmul",
    scheme=None,
    optional=True,
    reason="products of two activations lose accuracy; opt in with a rule on 'matmul'",
)
FLOAT_ATTENTION = (
    FLOAT_MATMUL,
    Rule(
        select="attention",
        scheme=None,
        optional=True,
        reason="its scores and probabilities lose accuracy; opt in with a rule on 'attention'",
    ),
)

CONFIGS: dict[str, QuantConfig] = {
    **KNOWN_CONFIGS,
    "int8": QuantConfig(
        name="int8", bias_correction=True, rules=(Rule(select="*", scheme=SCHEMES["int8"]), *FLOAT_ATTENTION)
    ),
    "int8_attention": QuantConfig(
        name="int8_attention",
        bias_correction=True,
        rules=(Rule(select="*", scheme=SCHEMES["int8"]), FLOAT_MATMUL),
    ),
    "int8_smoothquant": QuantConfig(
        name="int8_smoothquant",
        bias_correction=True,
        algorithms=("smoothquant",),  # type: ignore[arg-type]
        rules=(Rule(select="*", scheme=SCHEMES["int8"]), *FLOAT_ATTENTION),
    ),
    "int8_dynamic": QuantConfig(
        name="int8_dynamic", rules=(Rule(select="*", scheme=SCHEMES["int8_dynamic"]), *FLOAT_ATTENTION)
    ),
    "int8_dynamic_token": QuantConfig(
        name="int8_dynamic_token", rules=(Rule(select="*", scheme=SCHEMES["int8_dynamic_token"]), *FLOAT_ATTENTION)
    ),
    "int4": QuantConfig(name="int4", rules=_int4_linears(WEIGHT_INT4, WEIGHT_INT4)),
    "int4_awq": QuantConfig(
        name="int4_awq",
        rules=_int4_linears(WEIGHT_INT4_SEEN, WEIGHT_INT4),
        algorithms=("awq",),  # type: ignore[arg-type]
    ),
    "int4_gptq": QuantConfig(
        name="int4_gptq",
        rules=_int4_linears(WEIGHT_INT4_SEEN, WEIGHT_INT4_SEEN),
        algorithms=(Algorithm(name="gptq", args={"qep": 0.5}),),
    ),
    "int8_weight_only": QuantConfig(
        name="int8_weight_only", rules=(Rule(select="*", scheme=SCHEMES["int8_weight_only"]),)
    ),
}
