"""Checkpoints of transformers whose tensors have other names, or are several where the model has one."""

import json

import pytest
import torch
from safetensors.torch import save_file

import graphq
from causal_lm import Logits
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import LoadError
from graphq.graph.checkpoint import INDEX
from graphq.graph.on_disk import on_disk, values_of

hf = pytest.importorskip("transformers", minversion="5.0")
loading = pytest.importorskip("transformers.core_model_loading")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "use_cache": False, "attn_implementation": "sdpa",
}  # fmt: skip
ROUTED = {"num_experts": 12, "num_experts_per_tok": 4}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 4}
KINDS = {
    "Mixtral": {"num_local_experts": 12, "num_experts_per_tok": 4},
    "Qwen3Moe": {**ROUTED, "moe_intermediate_size": 16, "head_dim": 8},
    "Olmoe": ROUTED,
    "DeepseekV3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
                   "moe_intermediate_size": 16, "first_k_dense_replace": 0, **LATENT},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "attn_implementation": "eager"},
}  # fmt: skip


def saved(kind, folder):
    torch.manual_seed(0)
    config = getattr(hf, f"{kind}Config")(**{**SIZES, **KINDS[kind]})
    cls = getattr(hf, f"{kind}ForCausalLM")
    model = cls(config).eval()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "inv_freq" not in name:  # which the config makes
            tensor.data.normal_()
    model.save_pretrained(folder, max_shard_size="30KB")
    return model, lambda: cls(config)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_separate_tensors_are_read_as_the_model_has_them(kind, tmp_path):
    model, build = saved(kind, tmp_path)
    disk = graphq.from_disk(build, tmp_path)
    for (name, wanted), (other, found) in zip(model.named_parameters(), disk.named_parameters(), strict=True):
        assert name == other and on_disk(found) and torch.equal(values_of(found), wanted), name
    for (name, wanted), (other, found) in zip(model.named_buffers(), disk.named_buffers(), strict=True):
        assert name == other and torch.equal(found, wanted), name


def test_gptq_of_experts_on_disk_gives_what_it_gives_in_memory(tmp_path):
    model, build = saved("Mixtral", tmp_path / "model")
    data = [torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(n)) for n in range(2)]
    weight = QuantSpec(format="int4", granularity="group", group_size=16)
    config = QuantConfig(rules=(Rule(select="linear | experts", scheme=Scheme(weight=weight)),), algorithms=("gptq",))
    graphs = []
    for source, name in ((model, "memory"), (graphq.from_disk(build, tmp_path / "model"), "disk")):
        graph = graphq.prepare(Logits(source), config, (data[0],), target="simulation")
        graphs.append(graphq.calibrate(graph, data, progress=False, store=tmp_path / name))
    lost = [{r.node: r.output_squared_error for r in graphq.weight_results(g)} for g in graphs]
    assert lost[0] == pytest.approx(lost[1], rel=1e-4) and sum("grouped" in n or "experts" in n for n in lost[0]) >= 1
    one, two = ({w.parameter: w.read() for w in graphq.stored_weights(tmp_path / n)} for n in ("memory", "disk"))
    assert one.keys() == two.keys() and sum(w.ndim == 3 for w in one.values()) == 2
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_tensors_that_transformers_leaves_out_are_left_out(tmp_path, monkeypatch):
    _, build = saved("Mixtral", tmp_path)
    name = "model-extra.safetensors"
    save_file({"mtp.layers.0.weight": torch.zeros(2, 2)}, tmp_path / name)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["mtp.layers.0.weight"] = name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(LoadError, match=r"mtp\.layers\.0"):
        graphq.from_disk(build, tmp_path)
    monkeypatch.setattr(hf.MixtralForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    assert graphq.from_disk(build, tmp_path) is not None


def test_a_converter_that_fails_says_of_which_parameter(tmp_path, monkeypatch):
    _, build = saved("Mixtral", tmp_path)
    model = graphq.from_disk(build, tmp_path)
    monkeypatch.setattr(loading.MergeModulelist, "convert", lambda *a, **k: 1 / 0)
    with pytest.raises(LoadError, match=r"layers.0.mlp.experts.down_proj"):
        values_of(model.model.layers[0].mlp.experts.down_proj)


def test_tensors_of_which_the_model_makes_nothing_are_named(tmp_path):
    saved("Mixtral", tmp_path)
    config = hf.MixtralConfig(**{**SIZES, **KINDS["Mixtral"], "num_local_experts": 11})
    with pytest.raises(LoadError, match=r"\[12, 32\] in the file and \[11, 32\] in the model"):
        graphq.from_disk(lambda: hf.MixtralForCausalLM(config), tmp_path)
    narrow = hf.MixtralConfig(**{**SIZES, **KINDS["Mixtral"], "intermediate_size": 40})
    model = graphq.from_disk(lambda: hf.MixtralForCausalLM(narrow), tmp_path)
    with pytest.raises(LoadError, match=r"\[12, 96, 32\] instead of \[12, 80, 32\]"):
        values_of(model.model.layers[0].mlp.experts.gate_up_proj)
