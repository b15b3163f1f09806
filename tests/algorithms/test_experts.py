"""Experts whose weights are one tensor: captured as transformers writes them, quantized all, each on its own tokens."""

import pytest
import torch

import graphq
from causal_lm import Logits
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.graph.expert_ops import EXPERTS, experts
from graphq.passes.canonical import canonical_pipeline
from graphq.quantizer import quantizers

transformers = pytest.importorskip("transformers")
COUNT, UNSEEN = 6, 4  # of them, and the one that no token reaches
FREE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


@pytest.fixture(scope="module")
def mixtral():
    """A layer of six experts, one of which its router never chooses."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
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


def test_gradients_are_those_of_the_products():
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, 4, 3, dtype=torch.float64)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, w: experts(a, w, torch.tensor([2, 2, 5])), inputs)


@pytest.fixture(scope="module")
def rounded(mixtral):
    return calibrated(mixtral, config(("gptq",)))


def test_the_product_is_that_of_every_row_with_the_weight_of_its_expert():
    torch.manual_seed(0)
    x, weight, ends = torch.randn(9, 5), torch.randn(4, 7, 5), torch.tensor([2, 2, 8, 9])
    whose = [0, 0, 2, 2, 2, 2, 2, 2, 3]
    torch.testing.assert_close(
        experts(x, weight, ends), torch.stack([weight[e] @ r for e, r in zip(whose, x, strict=True)])
    )


def test_capture_and_canonical_form_keep_the_function(mixtral):
    graph = graphq.capture(mixtral, (data()[0],), dynamic_shapes=(FREE,))
    canonical_pipeline()(graph)
    assert len(graph.graph.find_nodes(op="call_function", target=EXPERTS)) == 2
    with torch.no_grad():
        torch.testing.assert_close(graph(data()[1]), mixtral(data()[1]), atol=1e-4, rtol=1e-4)


def test_all_experts_are_quantized_and_the_one_without_tokens_is_named(mixtral, rounded):
    results = [r for r in graphq.weight_results(rounded) if "experts" in r.layer]
    rows = [r for r in graphq.explain(rounded).rows if r.op.endswith("experts")]
    assert [r.action for r in rows] == ["weight_only"] * 2
    for row, result in zip(rows, results, strict=True):
        named = f"experts {', '.join(map(str, result.unseen))} saw no token and are rounded to the nearest"
        assert named in row.reason and UNSEEN in result.unseen and len(result.unseen) < COUNT / 2
        assert result.relative_output_squared_error < 0.8 * result.nearest  # on every expert's own tokens
    grids = {q.label: q for q in quantizers(rounded).values()}
    eager = graphq.apply_weights(rounded, mixtral)
    for (name, old), new in zip(mixtral.named_parameters(), eager.parameters(), strict=True):
        if "experts" in name:
            assert torch.equal(grids[name](new), new)
            assert not any(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(eager(data()[0]), rounded(data()[0]), atol=1e-4, rtol=1e-4)


class Modules(torch.nn.Module):
    """Experts as modules, each on the tokens that are picked for it."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = torch.nn.Linear(32, 4), torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(4))

    def forward(self, x):
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
        return out


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "adaround", "autoround", "awq"])
def test_experts_as_modules_have_their_own_tokens_and_one_without_is_named(algorithm):
    torch.manual_seed(0)
    model = Modules().eval()
    model.gate.bias.data[3] = -100
    batches = [torch.randn(40 + n, 32) for n in range(6)]
    prepared = graphq.prepare(
        model, config((algorithm,)), (batches[0],), target="simulation", dynamic_shapes=({0: FREE[0]},)
    )
    graph = graphq.calibrate(prepared, batches, progress=False)
    results = {r.layer: r for r in graphq.weight_results(graph)}
    if algorithm != "awq":
        assert len(results) == 4 and results["experts.3"].unseen == (0,) and not results["experts.2"].unseen
        assert results["experts.3"].mean_output_squared_error == 0
        assert "no token" in next(r.reason for r in graphq.explain(graph).rows if r.layer == "experts.3")
    [weight] = [w for w in graphq.quantized_weights(graph) if w.layer == "experts.3"]
    scale = weight.scale.repeat_interleave(16, 1)
    torch.testing.assert_close(weight.read(), (model.experts[3].weight / scale).round().clamp(-8, 7).detach() * scale)
    with torch.no_grad():
        assert graphq.compare(model, graph, batches, per_op=False).sqnr > 15


def test_static_experts_as_modules_run_in_the_runtime(tmp_path):
    torch.manual_seed(0)
    model, batches = Modules().eval(), [torch.randn(40 + n, 32) for n in range(4)]
    model.gate.bias.data[3] = -100
    graph = graphq.quantize(model, "int8", batches, dynamic_shapes=({0: FREE[0]},), progress=False)
    path = graphq.export(graph, tmp_path / "m.onnx")
    assert graphq.verify(graph, path, batches).agrees and graphq.compare(model, graph, batches).sqnr > 15


def test_scales_per_channel_are_those_of_every_expert_and_weights_come_back_from_a_store(mixtral, tmp_path):
    settings, graphs = config(("gptq",), granularity="channel"), []
    for _ in range(2):
        graph = graphq.prepare(mixtral, settings, (data()[0],), target="simulation", dynamic_shapes=(FREE,))
        with torch.no_grad():
            graphs.append(graphq.calibrate(graph, data(), progress=False, store=tmp_path / "store"))
    assert [q.scale.shape for n, q in quantizers(graphs[0]).items() if "down_proj" in n] == [(COUNT, 32, 1)]
    with torch.no_grad():
        assert torch.equal(graphs[0](data()[0]), graphs[1](data()[0]))
    shapes = {tuple(w.read().shape) for w in graphq.stored_weights(tmp_path / "store") if "experts" in w.parameter}
    assert shapes == {(COUNT, 96, 32), (COUNT, 32, 48)}
