"""Experts whose weights are one tensor: captured as transformers writes them, quantized all, each on its own tokens."""

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.graph.expert_ops import EXPERTS, experts
from graphq.quantizer import quantizers

transformers = pytest.importorskip("transformers")
COUNT, UNSEEN = 6, 4
FREE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False).logits


@pytest.fixture(scope="module")
def mixtral():
    """Two layers of six experts, one of which the router of the first layer never chooses."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=COUNT, num_experts_per_tok=2, attn_implementation="sdpa",
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data *= 5
    model.model.embed_tokens.weight.data += 0.1 * torch.randn(32)  # all tokens share a direction
    block = model.model.layers[0].mlp
    inputs = []
    handle = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data():
            model(batch)
    handle.remove()
    mean = torch.cat(inputs).mean(0)
    assert (torch.cat(inputs) @ mean).min() > 0  # what points the other way is never among the two best
    block.gate.weight.data[UNSEEN] = -100 * mean / mean.norm()
    return Logits(model)


def data():
    return [torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(n)) for n in range(6)]


def config(algorithms=(), **granularity):
    weight = QuantSpec(format="int4", observer="mse_grid", **granularity or {"granularity": "group", "group_size": 16})
    head = Rule(select="*lm_head | *gate", reason="head and router")
    return QuantConfig(
        rules=(Rule(select="linear | experts", scheme=Scheme(weight=weight)), head), algorithms=algorithms
    )


@torch.no_grad()
def calibrated(model, settings):
    graph = graphq.prepare(model, settings, (data()[0],), target="simulation", dynamic_shapes=(FREE,))
    return graphq.calibrate(graph, data(), progress=False)


def test_the_product_is_that_of_every_row_with_the_weight_of_its_expert():
    torch.manual_seed(0)
    x, weight, ends = torch.randn(9, 5), torch.randn(4, 7, 5), torch.tensor([2, 2, 8, 9])
    whose = [0, 0, 2, 2, 2, 2, 2, 2, 3]
    torch.testing.assert_close(
        experts(x, weight, ends), torch.stack([weight[e] @ r for e, r in zip(whose, x, strict=True)])
    )


def test_capture_and_canonical_form_keep_the_function(mixtral):
    prepared = graphq.prepare(mixtral, config(), (data()[0],), target="simulation", dynamic_shapes=(FREE,))
    assert len(prepared.graph.find_nodes(op="call_function", target=EXPERTS)) == 4
    with torch.no_grad():
        torch.testing.assert_close(prepared(data()[1]), mixtral(data()[1]), atol=1e-4, rtol=1e-4)


def test_all_experts_are_quantized_and_the_one_without_tokens_is_named(mixtral):
    graph = calibrated(mixtral, config(("gptq",)))
    results = {r.layer: r for r in graphq.weight_results(graph) if "experts" in r.layer}
    rows = [r for r in graphq.explain(graph).rows if r.op.endswith("experts")]
    assert [r.action for r in rows] == ["weight_only"] * 4 and "float" not in {r.action for r in rows}
    for row in rows:
        unseen = results[row.layer].unseen
        named = f"experts {', '.join(map(str, unseen))} saw no token and are rounded to the nearest"
        assert (named in row.reason) == bool(unseen) and len(unseen) < COUNT / 2
    assert UNSEEN in results["model.model.layers.0.mlp.experts"].unseen
    eager = graphq.apply_weights(graph, mixtral)
    grids = {q.label: q for q in quantizers(graph).values()}
    for (name, old), new in zip(mixtral.named_parameters(), eager.parameters(), strict=True):
        if "experts" in name:
            assert torch.equal(grids[name](new), new)
            assert not any(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(eager(data()[0]), graph(data()[0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("granularity", [{}, {"granularity": "channel"}])
def test_gptq_beats_rounding_on_each_experts_own_tokens(mixtral, granularity):
    graph = calibrated(mixtral, config(("gptq",), **granularity))
    results = [r for r in graphq.weight_results(graph) if "experts" in r.layer]
    assert len(results) == 4 and all(r.relative_output_squared_error < 0.8 * r.nearest for r in results)


def test_scales_per_channel_are_those_of_every_expert(mixtral):
    graph = calibrated(mixtral, config(granularity="channel"))
    scales = [q.scale.shape for n, q in quantizers(graph).items() if "down_proj" in n]
    assert scales == [(COUNT, 32, 1)] * 2


def test_weights_of_experts_come_back_from_a_store(mixtral, tmp_path):
    graph = graphq.prepare(mixtral, config(("gptq",)), (data()[0],), target="simulation", dynamic_shapes=(FREE,))
    with torch.no_grad():
        graphq.calibrate(graph, data(), progress=False, store=tmp_path / "store")
        again = graphq.prepare(mixtral, config(("gptq",)), (data()[0],), target="simulation", dynamic_shapes=(FREE,))
        graphq.calibrate(again, data(), progress=False, store=tmp_path / "store")
        assert torch.equal(graph(data()[0]), again(data()[0]))
    shapes = {tuple(w.read().shape) for w in graphq.stored_weights(tmp_path / "store") if "experts" in w.parameter}
    assert shapes == {(COUNT, 96, 32), (COUNT, 32, 48)}
