"""Which linears share a scale, and what it folds into: found in the graph, as other libraries write it down by name.

The wanted pairs are those of the smoothing and AWQ tables of llm-compressor and AutoAWQ; where ours differ a comment
says why.
"""

import pytest
import torch
import transformers as hf

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms.scaling import apply_everywhere, groups, tied, weights
from graphq.authoring import scaling_pairs

INT8 = Scheme(weight=QuantSpec(format="int8", granularity="channel"))
LINEARS = QuantConfig(name="linears", rules=(Rule(select="linear", scheme=INT8),))
SMALL = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 128}
DECODER = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 4, "tie_word_embeddings": False, "use_cache": False}
GROUPED = {**DECODER, "num_key_value_heads": 2}

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = {"post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"), "mlp.up_proj": ("mlp.down_proj",)}
LLAMA = {"input_layernorm": QKV, "self_attn.v_proj": ("self_attn.o_proj",), **GATED}
CASES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**DECODER), "model.layers.0.", LLAMA),
    # the tables of others leave o out where query heads share a v, by its shape: ours gives these channels one scale
    "llama, grouped heads": (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED), "model.layers.0.", LLAMA),
    "llama, one head of v": (
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**{**DECODER, "num_key_value_heads": 1}),
        "model.layers.0.",
        LLAMA,
    ),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config(**DECODER), "model.layers.0.", LLAMA),
    # the norm before the experts feeds the router, and tokens that are gathered for experts: no linears that share it
    "mixtral": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
        "model.layers.0.",
        {"input_layernorm": QKV, "self_attn.v_proj": ("self_attn.o_proj",), "": ("mlp.gate",)},
    ),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig(**DECODER, head_dim=16), "model.layers.0.", LLAMA),  # norms of 1 + w
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128, n_positions=64, use_cache=False),
        "transformer.h.0.",
        # q, k and v are one matrix, whose last third makes v: not a linear of its own; gelu keeps no scale
        {"ln_1": ("attn.c_attn",), "": ("attn.c_proj",), "ln_2": ("mlp.c_fc",), " ": ("mlp.c_proj",)},
    ),
    "opt": (
        hf.OPTForCausalLM,
        hf.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, max_position_embeddings=64, use_cache=False),
        "model.decoder.layers.0.",
        {
            "self_attn_layer_norm": QKV,
            "self_attn.v_proj": ("self_attn.out_proj",),
            "final_layer_norm": ("fc1",),
            "fc1": ("fc2",),  # a positive scale passes through relu
        },
    ),
    "bert": (
        hf.BertModel,
        hf.BertConfig(**SMALL, intermediate_size=96),
        "encoder.layer.0.",
        # the norms feed the residual stream too: their scales are multiplications
        {
            "": tuple(f"attention.self.{n}" for n in ("query", "key", "value")),
            "attention.self.value": ("attention.output.dense",),
            " ": ("intermediate.dense",),
            "  ": ("output.dense",),
        },
    ),
}


def prepared(name):
    kind, settings, prefix, wanted = CASES[name]
    torch.manual_seed(0)
    settings._attn_implementation = "sdpa"
    model, ids = kind(settings).eval(), torch.arange(16).reshape(2, 8) + 5
    for norm in (m for m in model.modules() if "norm" in type(m).__name__.lower()):
        norm.weight.data.uniform_(0.5, 2)
    return model, ids, graphq.prepare(model, LINEARS, (ids,), target="simulation"), prefix, wanted


class Table(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.wide = torch.nn.Embedding(40, 16), torch.nn.Linear(16, 32)

    def forward(self, ids):
        return self.wide(self.table(ids))


class Grouped(torch.nn.Module):
    """Heads share v as torch's own attention lets them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = torch.nn.Linear(64, 64), torch.nn.Linear(64, 16), torch.nn.Linear(64, 16)
        self.o = torch.nn.Linear(64, 64)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("model, x, into, linear", [
    (Table(), torch.arange(12).reshape(2, 6), "table", "wide"), (Grouped(), torch.randn(2, 5, 64), "v", "o"),
])  # fmt: skip
def test_scales_fold_into_tables_and_into_values_that_attention_shares(model, x, into, linear):
    # also where nobody has tied them
    graph = graphq.prepare(model.eval(), LINEARS, (x,), target="simulation")
    assert (into, (linear,)) in [(p.into, p.linears) for p in scaling_pairs(graph)]
    named = {g.name: g for g in groups(graph)}
    with torch.no_grad():
        want = model(x)
        apply_everywhere([graph], [named], {n: weights(graph, g)[0].abs().mean(0) * 9 + 0.5 for n, g in named.items()})
        assert torch.allclose(graph(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_those_that_others_keep_in_tables_and_keep_the_function(name):
    model, ids, graph, prefix, wanted = prepared(name)
    inside = [p for p in scaling_pairs(graph) if p.linears[0].startswith(prefix)]
    found = [(p.into.removeprefix(prefix), tuple(n.removeprefix(prefix) for n in p.linears)) for p in inside]
    assert sorted(found) == sorted((into.strip(), linears) for into, linears in wanted.items())
    named = {g.name: g for g in groups(graph)}
    random = torch.Generator().manual_seed(1)
    scales = {n: torch.rand(weights(graph, g)[0].shape[1], generator=random) * 1.5 + 0.5 for n, g in named.items()}
    scales = {n: tied(graph, g)(scales[n]) for n, g in named.items()}
    with torch.no_grad():
        want = model(ids)[0]
        apply_everywhere([graph], [named], scales)
        got = graph(ids)[0]
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-5
