"""Packed weights in eager models: the values of the dequantized ones, in few bytes, under every layer's own code."""

import copy

import pytest
import torch
from torch import nn

import graphq
from causal_lm import Logits
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import StateError

IDS = [torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(n)) for n in range(2)]
GROUPS = {"granularity": "group", "group_size": 16}
SPECS = {
    "int2": {"format": "int2", **GROUPS}, "uint3 with zero points": {"format": "uint3", "symmetric": False, **GROUPS},
    "int4": {"format": "int4", "granularity": "channel"}, "int6": {"format": "int6", **GROUPS},
    "uint8": {"format": "uint8", "symmetric": False, "granularity": "channel"}, "int12": {"format": "int12"},
    "nvfp4": {"format": "nvfp4"}, "fp8": {"format": "fp8_e4m3", "granularity": "channel"}, "mx6": {"format": "mx6"},
}  # fmt: skip


def bytes_of(model):
    tensors = {t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.lin = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.conv, self.back = nn.Conv1d(32, 16, 3, padding=1), nn.ConvTranspose1d(16, 32, 3, 1, 1)

    def forward(self, ids):
        x = self.lin(self.table(ids)).transpose(1, 2)
        return self.back(self.conv(x).relu())


def calibrated(model, spec, select, *algorithms, store=None):
    config = QuantConfig(rules=(Rule(select=select, scheme=Scheme(weight=spec)),), algorithms=algorithms)
    graph = graphq.prepare(model, config, (IDS[0],), target="simulation")
    return graphq.calibrate(graph, IDS, progress=False, store=store)


@pytest.mark.parametrize("name", SPECS)
def test_packed_weights_have_the_values_of_dequantized_ones(name):
    torch.manual_seed(0)
    model, spec = Mixed().eval(), QuantSpec(**SPECS[name])
    everything = spec.granularity == "channel" or spec.granularity == "tensor"
    select = "linear | conv | conv_transpose | embedding" if everything else "linear | embedding"
    graph = calibrated(model, spec, select)
    plain, packed = graphq.apply_weights(graph, model), graphq.apply_weights(graph, model, packed=True)
    assert type(packed.lin).__mro__[1] is nn.Linear and torch.equal(packed(IDS[0]), plain(IDS[0]))
    names = ["table", "lin", "conv", "back"] if everything else ["table", "lin"]
    for name in names:
        one, other = packed.get_submodule(name).weight, plain.get_submodule(name).weight
        assert one.dtype == other.dtype and torch.equal(one, other)
        container = next((b for b in (2, 4, 8) if spec.number_format.bits <= b), 16)
        held = packed.get_submodule(name).parametrizations.weight.original0
        assert held.untyped_storage().nbytes() * 8 == other.numel() * container


def test_a_state_dict_of_packed_weights_goes_into_another_model():
    torch.manual_seed(0)
    model, spec = Mixed().eval(), QuantSpec(**SPECS["int4"])
    packed = graphq.apply_weights(calibrated(model, spec, "linear", "gptq"), model, packed=True)
    other = copy.deepcopy(packed)
    assert torch.equal(other(IDS[0]), packed(IDS[0]))
    for value in other.state_dict().values():
        value.zero_()
    assert not torch.equal(other(IDS[0]), packed(IDS[0]))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other(IDS[0]), packed(IDS[0]))
    with pytest.raises(StateError, match="takes no other values"):
        packed.lin.weight = torch.zeros(32, 32)


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_a_packed_model_may_become_another_dtype_and_keeps_its_scales(name):
    torch.manual_seed(0)
    model, spec = Mixed().eval(), QuantSpec(**SPECS[name])
    graph = calibrated(model, spec, "linear | embedding")
    packed = graphq.apply_weights(graph, model, packed=True)
    scale, size = packed.lin.parametrizations.weight[0].scale.clone(), bytes_of(packed)
    half = packed.to(torch.bfloat16)
    want = graphq.apply_weights(graph, model).to(torch.bfloat16)
    assert half(IDS[0]).dtype == torch.bfloat16 and torch.equal(half(IDS[0]), want(IDS[0]))
    assert torch.equal(half.lin.parametrizations.weight[0].scale, scale) and bytes_of(half) < size
    elsewhere = half.to("meta")
    assert {t.device.type for t in (*elsewhere.parameters(), *elsewhere.buffers())} == {"meta"}


def test_a_packed_model_without_memory_is_filled_from_a_state_dict():
    model, spec = Mixed().eval(), QuantSpec(**SPECS["fp8"])
    graph = calibrated(model, spec, "linear | embedding")
    packed = graphq.apply_weights(graph, model, packed=True)
    empty = copy.deepcopy(packed).to("meta").to_empty(device="cpu")
    empty.load_state_dict(packed.state_dict())
    assert torch.equal(empty(IDS[0]), packed(IDS[0]))


def test_a_tied_weight_is_packed_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model, spec = Tied().eval(), QuantSpec(**SPECS["int4"])
    graph = calibrated(model, spec, "linear | embedding")
    packed = graphq.apply_weights(graph, model, packed=True)
    one, other = (m.parametrizations.weight for m in (packed.table, packed.head))
    assert one.original0 is other.original0 and one[0] is other[0]
    assert torch.equal(packed(IDS[0]), graphq.apply_weights(graph, model)(IDS[0]))
    assert sum(p.numel() for p in packed.parameters()) == 64 * 32 // 2


def test_packed_weights_go_where_the_model_is():
    model, spec = Mixed().eval(), QuantSpec(**SPECS["int4"])
    packed = graphq.apply_weights(calibrated(model, spec, "linear"), copy.deepcopy(model).to("meta"), packed=True)
    assert {t.device.type for t in (*packed.parameters(), *packed.buffers())} == {"meta"}


def test_a_weight_that_is_quantized_twice_is_not_packed():
    model = Mixed().eval()
    spec = QuantSpec(format="fp8_e4m3", granularity="channel", then=QuantSpec(format="int4", **GROUPS))
    with pytest.raises(StateError, match="no codes"):
        graphq.apply_weights(calibrated(model, spec, "linear"), model, packed=True)


def test_a_checkpoint_larger_than_memory_becomes_a_packed_model_that_generates(tmp_path):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = hf.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, attn_implementation="sdpa", use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    hf.LlamaForCausalLM(settings).save_pretrained(tmp_path / "model")
    build = lambda: hf.LlamaForCausalLM(settings)  # noqa: E731
    spec = QuantSpec(format="int4", **GROUPS)
    disk = graphq.from_disk(build, tmp_path / "model")
    graph = calibrated(Logits(disk), spec, "*_proj", "awq", "gptq", store=tmp_path / "store")
    with pytest.raises(StateError, match="apply_stored"):
        graphq.apply_weights(graph, Logits(disk), packed=True)
    packed = graphq.apply_stored(tmp_path / "store", Logits(graphq.from_disk(build, tmp_path / "model")), packed=True)
    packed = packed.model
    assert torch.equal(packed(IDS[0]).logits, graphq.fold_weights(graph)(IDS[0]))
    assert packed.generate(IDS[0], max_new_tokens=3, use_cache=False).shape == (2, 15)
    table = packed.get_input_embeddings().weight
    assert packed.lm_head.weight is table
    linears = [p for n, p in disk.named_parameters() if "_proj" in n]
    assert bytes_of(packed) < table.numel() * 4 + sum(p.numel() for p in linears) * 0.8 + 3000
