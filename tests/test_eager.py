"""Weights of a graph, put back into the model: it computes what the graph does, and other graphs are refused."""

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import StateError


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(self.norm(x))))


def data():
    return [torch.randn(2, 9, 64) * torch.linspace(0.1, 4, 64) for _ in range(4)]


def calibrated(model, *algorithms):
    config = QuantConfig(name="w4", rules=QuantConfig.load("int4").rules, algorithms=algorithms)
    return graphq.calibrate(graphq.prepare(model, config, (data()[0],)), data(), progress=False)


@pytest.mark.parametrize("algorithms", [(), ("gptq",), ("fpi_gptq",)])
def test_the_model_computes_what_the_graph_does(algorithms):
    model = nn.Sequential(Block(), Block()).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = calibrated(model, *algorithms)
    applied = graphq.apply_weights(graph, model)
    x = data()[0]
    assert torch.allclose(applied(x), graph(x), rtol=1e-6, atol=1e-6) and not torch.allclose(applied(x), model(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_folded_scales_go_into_the_norms():
    model = nn.Sequential(Block(), Block()).eval()
    graph = calibrated(model, {"name": "awq"}, "gptq")
    if any(not fold for _, fold in graph.meta["graphq_smoothed"]):
        with pytest.raises(StateError, match="no place"):
            graphq.apply_weights(graph, model)
    else:
        applied = graphq.apply_weights(graph, model)
        assert torch.allclose(applied(data()[0]), graph(data()[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
@pytest.mark.parametrize("algorithms", [("awq", "gptq"), ("smoothquant", "rtn")])
def test_decoders_whose_heads_share_keys_and_values_generate_with_scaled_weights(kind, algorithms):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = getattr(hf, f"{kind}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, use_cache=False, attn_implementation="sdpa", tie_word_embeddings=False,
    )  # fmt: skip
    model = getattr(hf, f"{kind}ForCausalLM")(settings).eval()
    for norm in (m for m in model.modules() if "norm" in type(m).__name__.lower()):
        norm.weight.data.uniform_(0.2, 3)
    ids = [torch.randint(0, 64, (2, 16)) for _ in range(3)]
    weight = QuantSpec(format="int3", granularity="group", group_size=8)
    inputs = QuantSpec(format="int4", granularity="token", dynamic=True) if "smoothquant" in algorithms else None
    config = QuantConfig(rules=(Rule(select="linear", scheme=Scheme(weight=weight, input=inputs)),),
                         algorithms=algorithms)  # fmt: skip
    graph = graphq.calibrate(graphq.prepare(model, config, (ids[0],), target="simulation"), ids, progress=False)
    assert graph.meta["graphq_smoothed"] and all(folded for _, folded in graph.meta["graphq_smoothed"])
    applied = graphq.apply_weights(graph, model)
    if inputs is None:
        assert torch.allclose(applied(ids[0]).logits, graph(ids[0])[0], rtol=1e-4, atol=1e-5)
    assert applied.generate(ids[0][:1], max_new_tokens=4, do_sample=False, use_cache=False).shape == (1, 20)


def test_what_does_not_fit_the_model_is_refused():
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    images = [torch.randn(2, 3, 8, 8)]
    graph = graphq.calibrate(graphq.prepare(conv, "int8", (images[0],)), images, progress=False)
    with pytest.raises(StateError, match="no place for this tensor"):
        graphq.apply_weights(graph, conv)
    with pytest.raises(StateError, match="calibrated graph"):
        graphq.apply_weights(graphq.convert(graph), conv)
    other = nn.Sequential(Block(), nn.Sequential(Block())).eval()
    with pytest.raises(StateError, match="no place for this tensor"):
        graphq.apply_weights(calibrated(nn.Sequential(Block(), Block()).eval()), other)


def test_a_model_in_the_place_of_the_graph_is_told_from_it():
    model = nn.Sequential(Block()).eval()
    with pytest.raises(StateError, match="from a calibrated graph"):
        graphq.apply_weights(model, calibrated(model))


def test_a_weight_that_is_a_buffer_is_said_to_go_back_dequantized():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(16, 64))

        def forward(self, x):
            return nn.functional.linear(x, self.table)

    model = Buffered().eval()
    graph = calibrated(model, "gptq")
    with pytest.warns(UserWarning, match="table is no parameter"):
        applied = graphq.apply_weights(graph, model, packed=True)
    x = data()[0]
    assert torch.allclose(applied(x), graph(x), atol=1e-6) and not torch.allclose(applied(x), model(x))


def test_a_table_that_is_read_as_it_is_and_through_a_quantizer_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(20, 64), nn.Linear(64, 20, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    ids = [torch.randint(0, 20, (2, 7))]
    config = QuantConfig(rules=QuantConfig.load("int4").rules[:1])
    graph = graphq.calibrate(graphq.prepare(Tied().eval(), config, (ids[0],)), ids, progress=False)
    with pytest.raises(StateError, match="read in two ways"):
        graphq.apply_weights(graph, Tied().eval())
