"""Explicit groups, in the words of AMD Quark: the only ones that are scaled, and held against the graph."""

import pytest
import torch
import transformers as hf

import graphq
from causal_lm import Logits
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms.scaling import SMOOTHED
from graphq.errors import ConfigError

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "attn_implementation": "sdpa", "use_cache": False,
}  # fmt: skip
QKV = {"prev_op": "input_layernorm", "layers": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
       "inp": "self_attn.q_proj", "module2inspect": "self_attn"}  # fmt: skip
GATED = {"prev_op": "post_attention_layernorm", "layers": ["mlp.gate_proj", "mlp.up_proj"], "help": "linear 1"}
OUT = {"prev_op": "self_attn.v_proj", "layers": ["self_attn.o_proj"]}
SHAPES = "module.self_attn.v_proj.weight.shape == module.self_attn.o_proj.weight.shape"
DATA = [torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(n)) for n in range(3)]


def scaled(entries, kv_heads=4, algorithm="awq", **args):
    """Names of the groups that got a scale that was folded, and the graph."""
    torch.manual_seed(0)
    model = Logits(hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=kv_heads)).eval())
    weight = QuantSpec(format="int3", granularity="group", group_size=16)
    inputs = QuantSpec(format="int8", granularity="token", dynamic=True) if algorithm == "smoothquant" else None
    rules = (Rule(select="linear", scheme=Scheme(weight=weight, input=inputs)), Rule(select="*lm_head"))
    algorithms = ({"name": algorithm, "args": {"scaling_layers": entries, **args}},)
    config = QuantConfig(rules=rules, algorithms=algorithms)
    graph = graphq.calibrate(graphq.prepare(model, config, (DATA[0],), target="simulation"), DATA, progress=False)
    return [name for name, folded in graph.meta[SMOOTHED] if folded], graph


@pytest.mark.parametrize("algorithm, args", [("awq", {}), ("smoothquant", {"alpha": 0.5})])
def test_only_the_groups_that_are_listed_are_scaled(algorithm, args):
    found, graph = scaled([QKV, GATED], algorithm=algorithm, **args)
    assert 2 <= len(found) <= 4 and len(graph.meta[SMOOTHED]) == len(found)
    changed = {n.rpartition(".")[0].rpartition("layers.")[2] for n, _ in graph.named_buffers() if "smoothed" in n}
    own = {"input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
           "mlp.up_proj", "post_attention_layernorm"}  # fmt: skip
    assert changed <= {f"{i}.{name}" for i in range(2) for name in own} and changed


def test_a_listed_group_may_have_no_scale_in_some_layers():
    found, _ = scaled([QKV], algorithm="smoothquant", alpha={"*layers.0.*": None, "*layers.1.*": 0.5})
    assert len(found) == 1


def test_an_entry_whose_condition_does_not_hold_is_left_out():
    assert scaled([QKV, {**OUT, "condition": SHAPES}], kv_heads=2)[0] == scaled([QKV], kv_heads=2)[0]
    assert len(scaled([OUT], kv_heads=4)[0]) == len(scaled([{**OUT, "condition": SHAPES}], kv_heads=4)[0])
    with pytest.raises(ConfigError, match="no condition holds"):
        scaled([{**OUT, "condition": SHAPES}], kv_heads=2)


@pytest.mark.parametrize(
    "entry, match",
    [
        ({**OUT, "prev_op": "self_attn.q_proj"}, "it folds into .*self_attn.v_proj"),
        ({**QKV, "prev_op": "post_attention_layernorm"}, "it folds into .*input_layernorm"),
        ({**QKV, "layers": ["self_attn.q_proj", "self_attn.k_proj"]}, "names others"),
        ({**QKV, "layers": ["self_attn.qproj"]}, "no quantized linear is called .*self_attn.qproj"),
        ({"prev_op": "input_layernorm"}, "scaling_layers"),
        ({**QKV, "module2inspct": "mlp"}, "module2inspect"),
        ({**QKV, "condition": "__import__('os').getcwd()"}, "compares attributes"),
        ({**QKV, "condition": "module.__class__ == 1"}, "compares attributes"),
        ({**QKV, "condition": "module.self_attn.w.shape == 1"}, "cannot be told"),
        ({**QKV, "condition": "module.("}, "cannot be told"),
    ],
)
def test_what_the_graph_does_not_show_is_an_error_that_says_what_it_shows(entry, match):
    with pytest.raises(ConfigError, match=match):
        scaled([entry], kv_heads=2)


def test_the_list_of_decoder_layers_is_found_by_the_end_of_its_path():
    assert scaled([QKV], model_decoder_layers="layers")[0] == scaled([QKV])[0]
    with pytest.raises(ConfigError, match="where scaling_layers are"):
        scaled(None, model_decoder_layers="model.layers")
    with pytest.raises(ConfigError, match="no list of layers"):
        scaled([QKV], model_decoder_layers="model.layer")
