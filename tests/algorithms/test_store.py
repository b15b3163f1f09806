"""Weights on disk: models larger than memory, runs that go on where they were stopped, and weights read back."""

import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import graphq
from causal_lm import Logits
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.algorithms import autoround as autoround_module
from graphq.algorithms import awq as awq_module
from graphq.algorithms import sequential
from graphq.calibration import stream as stream_module
from graphq.errors import ConfigError, LoadError, StateError
from graphq.graph.checkpoint import from_disk
from graphq.graph.on_disk import on_disk, values_of
from graphq.quantizer import quantizers

transformers = pytest.importorskip("transformers")
CONFIG = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_implementation": "sdpa", "use_cache": False, "tie_word_embeddings": True,
}  # fmt: skip
WEIGHT = QuantSpec(format="int4", granularity="group", group_size=16, observer="mse_grid")
DATA = [torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(n)) for n in range(3)]


def build():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    model = build().to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data *= 5
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def in_memory(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return Logits(model.eval())


def config(weight=WEIGHT, algorithms=({"name": "gptq", "args": {"qep": 0.5}},)):
    rules = (Rule(select="linear", scheme=Scheme(weight=weight)), Rule(select="*lm_head", reason="the head"))
    return QuantConfig(rules=rules, algorithms=algorithms)


def prepared(model, settings=None):
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    return graphq.prepare(model, settings or config(), (DATA[0],), target="simulation", dynamic_shapes=(free,))


def files(folder):
    return {p.name: load_file(p) for p in folder.glob("*.safetensors")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k][t], b[k][t]) for k in a for t in a[k])


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """The graph of a model in memory, and the store that it has left."""
    store = tmp_path_factory.mktemp("whole") / "store"
    return graphq.calibrate(prepared(in_memory(checkpoint)), DATA, progress=False, store=store), store


def test_samples_that_wait_on_disk_give_the_same_bits_and_leave_nothing_there(checkpoint, whole, tmp_path, monkeypatch):
    graph, written, save = prepared(Logits(from_disk(build, checkpoint))), [], torch.save
    monkeypatch.setattr(torch, "save", lambda values, path: (written.append(path), save(values, path)))
    graphq.calibrate(graph, DATA, progress=False, store=tmp_path / "store", frontier="disk")
    assert len({p.name for p in written}) == len(DATA) and len(written) > 4 * len(DATA)
    assert same(files(tmp_path / "store"), files(whole[1]))
    assert not list((tmp_path / "store").glob("frontier*"))


def test_samples_can_wait_on_disk_only_where_there_is_a_store(checkpoint):
    with pytest.raises(ConfigError, match="frontier"):
        graphq.calibrate(prepared(in_memory(checkpoint)), DATA, progress=False, frontier="disk")


def test_a_model_on_disk_may_weigh_errors_by_inputs_where_an_algorithm_chooses_all_weights(checkpoint, tmp_path):
    weighted = WEIGHT.model_copy(update={"observer": "imatrix_mse"})
    for name, model in (("disk", Logits(from_disk(build, checkpoint))), ("memory", in_memory(checkpoint))):
        graphq.calibrate(prepared(model, config(weighted)), DATA, progress=False, store=tmp_path / name)
    assert same(files(tmp_path / "disk"), files(tmp_path / "memory"))
    with pytest.raises(StateError, match="weights are on disk"):
        graph = prepared(Logits(from_disk(build, checkpoint)), config(weighted, ()))
        graphq.calibrate(graph, DATA, progress=False)


def test_parameters_are_read_where_they_are_used_and_stay_shared(checkpoint):
    model, loaded = from_disk(build, checkpoint), in_memory(checkpoint).model
    parameters = dict(model.named_parameters())
    assert parameters and all(on_disk(p) and p.untyped_storage().nbytes() == 4 for p in parameters.values())
    assert all(torch.equal(values_of(p), loaded.get_parameter(n)) for n, p in parameters.items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_on_disk_gets_the_weights_that_it_gets_in_memory(checkpoint, whole, tmp_path):
    graph = graphq.calibrate(prepared(in_memory(checkpoint)), DATA, progress=False)
    kept, store = whole
    with torch.no_grad():
        assert torch.equal(kept(DATA[0]), graph(DATA[0]))
    lazy = prepared(Logits(from_disk(build, checkpoint)))
    graphq.calibrate(lazy, DATA, progress=False, store=tmp_path / "lazy")
    assert same(files(store), files(tmp_path / "lazy")) and len(files(store)) == 7
    a, b = (graphq.weight_results(g) for g in (graph, lazy))
    assert [r.output_squared_error for r in a] == [r.output_squared_error for r in b]
    with pytest.raises(StateError, match="compute NaN"):
        lazy(DATA[0])
    with pytest.raises(StateError, match="on disk already"):
        graphq.save(lazy, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(graphq.apply_stored(tmp_path / "lazy", in_memory(checkpoint))(DATA[0]), graph(DATA[0]))


SCRIPT = """
import sys, torch, graphq
sys.path[:0] = [{here!r}, {here!r}.rpartition("/")[0]]
import test_store as t
graphq.calibrate(t.prepared(t.Logits(t.from_disk(t.build, {checkpoint!r}))), t.DATA, progress=False, store={store!r})
"""


def test_a_run_that_is_killed_goes_on_to_the_same_bits(checkpoint, whole, tmp_path):
    killed = tmp_path / "killed"
    here = str(__file__).rpartition("/")[0]
    script = SCRIPT.format(here=here, checkpoint=str(checkpoint), store=str(killed))
    run = subprocess.Popen([sys.executable, "-c", script])
    while run.poll() is None and len(list(killed.glob("*.weight.safetensors"))) < 3:
        pass
    run.kill()
    run.wait()
    assert 3 <= len(files(killed)) < 7
    stamps = {p.name: p.stat().st_mtime_ns for p in killed.glob("*.weight.safetensors")}
    graph = prepared(Logits(from_disk(build, checkpoint)))
    graphq.calibrate(graph, DATA, progress=False, store=killed)
    assert same(files(whole[1]), files(killed))
    assert all((killed / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())  # not chosen again


def test_a_folder_of_another_run_is_refused(checkpoint, whole):
    before = files(whole[1])
    with pytest.raises(StateError, match="another run"):
        graphq.calibrate(prepared(in_memory(checkpoint)), DATA[:2], progress=False, store=whole[1])
    assert same(before, files(whole[1]))


class Normed(nn.Module):
    """Two linears with a norm before them, so that a rule can be about one."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.a, self.b = nn.BatchNorm1d(32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.norm.running_mean += 3

    def forward(self, x):
        return self.b(torch.nn.functional.gelu(self.a(self.norm(x))))


def tiny(weight=WEIGHT, algorithms=("gptq",), given=None):
    rules = (Rule(select="linear", scheme=Scheme(weight=weight, input=given)),)
    return QuantConfig(rules=rules, algorithms=algorithms)


def test_weights_of_another_model_are_refused(tmp_path):
    x, model = torch.randn(16, 32), Normed(0).eval()
    for number in (0, 1):
        graph = graphq.prepare(model, tiny(), (x,), target="simulation")
        if number == 0:
            graphq.calibrate(graph, [x], progress=False, store=tmp_path / "store")
            next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.data[0, 0] += 1
            continue
        with pytest.raises(StateError, match="of another model"):
            graphq.calibrate(graph, [x], progress=False, store=tmp_path / "store")
        assert not any(q.settled for q in quantizers(graph).values())


def test_a_model_on_disk_is_converted_with_its_values_and_buffers(tmp_path):
    model, x = Normed().eval(), torch.randn(16, 32)
    save_file(dict(model.state_dict()), tmp_path / "m.safetensors")
    lazy = from_disk(Normed, tmp_path)
    with torch.no_grad():
        for config in ("int8_dynamic", tiny()):
            target = "onnxruntime" if config == "int8_dynamic" else "simulation"
            graphs = [graphq.quantize(m, config, [x], target=target, progress=False) for m in (model, lazy)]
            assert torch.equal(graphs[0](x), graphs[1](x)) and not graphs[1](x).isnan().any()
            if target == "onnxruntime":
                assert graphq.verify(graphs[1], graphq.export(graphs[1], tmp_path / "m.onnx"), [x]).agrees


def test_what_the_files_say_and_the_model_has_no_place_for_is_refused(tmp_path):
    state = dict(Normed().state_dict())
    save_file(state | {"a.weight_scale": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match=r"no place in the model: a\.weight_scale"):
        from_disk(Normed, tmp_path)
    save_file(state | {"a.weight": state["a.weight"].to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(LoadError, match="stored as F8_E4M3"):
        from_disk(Normed, tmp_path)


def test_a_store_keeps_the_scale_over_block_scales(tmp_path):
    model, x = Normed().eval(), torch.randn(16, 32)
    graphs = []
    for store in (None, tmp_path / "store"):
        graph = graphq.prepare(model, tiny(QuantSpec(format="nvfp4")), (x,), target="tensorrt")
        graphs.append(graphq.convert(graphq.calibrate(graph, [x], progress=False, store=store)))
    reads = [len(onnx_nodes(graphq.export(g, tmp_path / "m.onnx"))) for g in graphs]
    assert reads[0] == reads[1] and torch.equal(graphs[0](x), graphs[1](x))


def test_an_algorithm_that_looks_at_the_whole_model_wants_it_in_memory(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    save_file(dict(build().state_dict()), tmp_path / "m.safetensors")
    absorb = {"name": "equalization", "args": {"absorb": True}}
    weight = QuantSpec(format="int8", granularity="channel")
    graph = graphq.prepare(
        from_disk(build, tmp_path), tiny(weight, (absorb,)), (torch.randn(2, 4),), target="simulation"
    )
    with pytest.raises(StateError, match="looks at the whole model"):
        graphq.calibrate(graph, [torch.randn(2, 4)], progress=False)


def onnx_nodes(path):
    import onnx

    return [n for n in onnx.load(path).graph.node if n.op_type == "DequantizeLinear"]


def test_what_a_store_cannot_keep_and_what_a_model_on_disk_cannot_do_are_refused(checkpoint, whole, tmp_path):
    with pytest.raises(ConfigError, match="layer by layer"):
        graphq.calibrate(prepared(in_memory(checkpoint), config(algorithms=())), DATA, store=tmp_path / "store")
    static = QuantConfig.load("int8").with_rules(Rule(select="*lm_head | embedding", reason="the head"))
    with pytest.raises(StateError, match="weights are on disk"):
        graphq.calibrate(prepared(Logits(from_disk(build, checkpoint)), static), DATA, progress=False)
    with pytest.raises(StateError, match="weights are on disk"):
        graphq.qat(graphq.calibrate(prepared(Logits(from_disk(build, checkpoint)), config(algorithms=())), DATA))
    with pytest.raises(LoadError, match="48"):
        from_disk(
            lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG | {"intermediate_size": 64})),
            checkpoint,
        )
    with pytest.raises(LoadError, match="no safetensors"):
        from_disk(build, tmp_path)
    with pytest.raises(LoadError, match="no such parameter"):
        graphq.apply_stored(whole[1], nn.Linear(2, 2))
    damaged = tmp_path / "damaged"
    shutil.copytree(whole[1], damaged)
    path = next(damaged.glob("*.weight.safetensors"))
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(LoadError, match="cannot be read"):
        graphq.apply_stored(damaged, in_memory(checkpoint))


def test_convolutions_and_scales_per_channel_come_back_as_they_were(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)).eval()
    data = [torch.randn(4, 4, 5, 5) for _ in range(2)]
    rules = (Rule(select="*", scheme=Scheme(weight=QuantSpec(format="uint4", symmetric=False, granularity="channel"))),)
    settings = QuantConfig(rules=rules, algorithms=("gptq",))

    def calibrated(**how):
        graph = graphq.prepare(model, settings, (data[0],), target="simulation")
        return graphq.calibrate(graph, data, progress=False, **how)

    graph, kept = calibrated(), calibrated(store=tmp_path / "store")
    again = calibrated(store=tmp_path / "store")
    assert torch.equal(graph(data[0]), kept(data[0])) and torch.equal(graph(data[0]), again(data[0]))
    assert {w.parameter: list(w.read().shape) for w in graphq.stored_weights(tmp_path / "store")} == {
        "0.weight": [6, 2, 3, 3], "3.weight": [3, 54],
    }  # fmt: skip


SCALED = ("awq", {"name": "gptq"})


@pytest.fixture(scope="module")
def scaled(checkpoint, tmp_path_factory):
    """As `whole`, with AWQ before GPTQ."""
    store = tmp_path_factory.mktemp("scaled") / "store"
    graph = prepared(in_memory(checkpoint), config(algorithms=SCALED))
    return graphq.calibrate(graph, DATA, progress=False, store=store), store


def test_awq_of_a_model_on_disk_gives_the_bits_of_one_in_memory(checkpoint, scaled, tmp_path):
    graph = prepared(Logits(from_disk(build, checkpoint)), config(algorithms=SCALED))
    graphq.calibrate(graph, DATA, progress=False, store=tmp_path / "store")
    assert same(files(tmp_path / "store"), files(scaled[1]))
    assert len(graph.meta["graphq_smoothed"]) == 4
    assert all(on_disk(t) for n, t in graph.named_buffers() if n.endswith("weight_smoothed") and t.ndim == 2)
    assert torch.equal(graphq.fold_weights(graph)(DATA[0]), graphq.fold_weights(scaled[0])(DATA[0]))


def test_scales_that_a_stopped_run_has_found_are_not_searched_again(checkpoint, scaled, tmp_path, monkeypatch):
    shutil.copytree(scaled[1], tmp_path / "store")
    for path in list((tmp_path / "store").glob("*.weight.safetensors"))[:3]:
        path.unlink()
    monkeypatch.setattr(awq_module, "_searched", lambda *_: pytest.fail("searched again"))
    graph = prepared(in_memory(checkpoint), config(algorithms=SCALED))
    graphq.calibrate(graph, DATA, progress=False, store=tmp_path / "store")
    assert same(files(tmp_path / "store"), files(scaled[1]))


def test_scaled_weights_and_norms_go_into_an_eager_model(checkpoint, scaled):
    graph, store = scaled
    assert any("scaled_dot_product" in name or "reshape" in name for name, _ in graph.meta["graphq_smoothed"])
    assert all(folded for _, folded in graph.meta["graphq_smoothed"])
    torch.testing.assert_close(graphq.apply_stored(store, in_memory(checkpoint))(DATA[0]), graph(DATA[0]))


def test_scales_between_two_ops_have_no_place_in_an_eager_model(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 8)).eval()
    data = [torch.randn(9, 16) * torch.linspace(0.1, 9, 16) for _ in range(3)]
    settings = QuantConfig(rules=config().rules[:1], algorithms=SCALED)
    graph = graphq.prepare(model, settings, (data[0],), target="simulation")
    graphq.calibrate(graph, data, progress=False, store=tmp_path / "store")
    before = model(data[0])
    with pytest.raises(LoadError, match=r"two ops[\s\S]*fold_weights"):
        graphq.apply_stored(tmp_path / "store", model)
    assert torch.equal(model(data[0]), before)


def test_a_run_that_was_stopped_is_not_applied_and_says_how_far_it_came(checkpoint, whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "store")
    next((tmp_path / "store").glob("*gate_proj*.weight.safetensors")).unlink()
    model = in_memory(checkpoint)
    before = model(DATA[0])
    with pytest.raises(LoadError, match=r"1 of 7 weights are not chosen[\s\S]*gate_proj[\s\S]*goes on"):
        graphq.apply_stored(tmp_path / "store", model)
    assert torch.equal(model(DATA[0]), before)


def test_weights_that_no_algorithm_has_chosen_are_said_to_stay_float(checkpoint, tmp_path):
    rules = (*config().rules[:1], Rule(select="embedding", scheme=Scheme(weight=WEIGHT)))
    settings = QuantConfig(rules=rules, ignore=("*lm_head",), algorithms=("rtn",))
    graphq.calibrate(prepared(in_memory(checkpoint), settings), DATA, progress=False, store=tmp_path / "store")
    with pytest.warns(UserWarning, match=r"stay float.*weight: rows of a table are not summed"):
        graphq.apply_stored(tmp_path / "store", in_memory(checkpoint))


def test_a_graph_whose_weights_are_on_disk_says_so_when_it_is_run(checkpoint, tmp_path):
    graph = prepared(Logits(from_disk(build, checkpoint)), config(algorithms=("rtn",)))
    graphq.calibrate(graph, DATA, progress=False, store=tmp_path / "store")
    with pytest.raises(StateError, match=r"compute NaN[\s\S]*fold_weights"):
        graph(DATA[0])
    assert graphq.fold_weights(graph)(DATA[0]).isfinite().all()


def test_smoothquant_of_a_model_on_disk_gives_the_scales_of_one_in_memory(checkpoint, tmp_path):
    dynamic = QuantSpec(format="int8", granularity="token", dynamic=True)
    scheme = Scheme(input=dynamic, weight=QuantSpec(format="int8", granularity="channel"))
    rules = (Rule(select="linear", scheme=scheme), Rule(select="*lm_head", reason="the head"))
    settings = QuantConfig(rules=rules, algorithms=("smoothquant", "rtn"))
    for name, model in (("disk", Logits(from_disk(build, checkpoint))), ("memory", in_memory(checkpoint))):
        graphq.calibrate(prepared(model, settings), DATA, progress=False, store=tmp_path / name)
    found = files(tmp_path / "disk")
    assert found["scales-0.safetensors"] and same(found, files(tmp_path / "memory"))


def test_a_run_that_stopped_before_all_scaled_weights_were_chosen_is_not_applied(checkpoint, scaled, tmp_path):
    shutil.copytree(scaled[1], tmp_path / "store")
    next((tmp_path / "store").glob("*down_proj*.weight.safetensors")).unlink()
    with pytest.raises(LoadError, match=r"1 weights that took in scales[\s\S]*down_proj"):
        graphq.apply_stored(tmp_path / "store", in_memory(checkpoint))


def test_scales_of_another_model_are_refused(checkpoint, scaled, tmp_path):
    shutil.copytree(scaled[1], tmp_path / "store")
    for path in (tmp_path / "store").glob("*.weight.safetensors"):
        path.unlink()
    model = in_memory(checkpoint)
    model.model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(StateError, match="scales of another model"):
        graphq.calibrate(prepared(model, config(algorithms=SCALED)), DATA, progress=False, store=tmp_path / "store")


def test_a_run_that_failed_behind_the_scales_goes_on_with_the_same_graph(checkpoint, scaled, tmp_path, monkeypatch):
    graph = prepared(in_memory(checkpoint), config(algorithms=SCALED))
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "round_weights", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            graphq.calibrate(graph, DATA, progress=False, store=tmp_path / "store")
    graphq.calibrate(graph, DATA, progress=False, store=tmp_path / "store")
    assert same(files(tmp_path / "store"), files(scaled[1]))


def test_one_algorithm_that_chooses_all_weights_is_enough(checkpoint):
    graph = prepared(in_memory(checkpoint), config(algorithms=("gptq", "rtn")))
    with pytest.raises(ConfigError, match="leaves none for rtn"):
        graphq.calibrate(graph, DATA, progress=False)


def test_a_model_that_differs_in_what_is_not_quantized_is_another(checkpoint, whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "store")
    model = in_memory(checkpoint)
    model.model.model.norm.weight.data[0] += 1
    with pytest.raises(StateError, match="another run"):
        graphq.calibrate(prepared(model), DATA, progress=False, store=tmp_path / "store")


@pytest.mark.parametrize("names", [("gptq", "awq"), ("rtn", "smoothquant"), ("autoround", "equalization")])
def test_scales_are_not_sought_behind_what_chooses_weights(checkpoint, names):
    graph = prepared(in_memory(checkpoint), config(algorithms=names))
    with pytest.raises(ConfigError, match=f"{names[1]} comes behind {names[0]}"):
        graphq.calibrate(graph, DATA, progress=False)


def test_a_finished_store_costs_no_forward_of_the_model(checkpoint, whole, monkeypatch):
    ran = []
    monkeypatch.setattr(stream_module.Stream, "_step", lambda self, *a: ran.append(a))
    graph = graphq.calibrate(prepared(Logits(from_disk(build, checkpoint))), DATA, progress=False, store=whole[1])
    assert not ran and len(graphq.weight_results(graph)) == 7


def test_autoround_takes_a_model_on_disk_with_weighted_ranges(checkpoint):
    weighted = WEIGHT.model_copy(update={"observer": "imatrix_mse"})
    settings = config(weighted, ({"name": "autoround", "args": {"iterations": 3}},))
    outputs = [
        graphq.fold_weights(graphq.calibrate(prepared(model, settings), DATA, progress=False))(DATA[0])
        for model in (Logits(from_disk(build, checkpoint)), in_memory(checkpoint))
    ]
    assert torch.equal(*outputs)


def test_autoround_that_is_stopped_goes_on_to_the_same_bits(checkpoint, tmp_path, monkeypatch):
    settings = config(algorithms=({"name": "autoround", "args": {"iterations": 3, "layers": 1}},))
    whole = graphq.calibrate(prepared(in_memory(checkpoint), settings), DATA, progress=False)
    learn, calls = autoround_module._Walk._learn, []

    def stops(self, *args):
        calls.append(args[0].start.name)
        if len(calls) >= 3:
            raise KeyboardInterrupt
        learn(self, *args)

    store = tmp_path / "store"
    for model in (Logits(from_disk(build, checkpoint)), in_memory(checkpoint)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(autoround_module._Walk, "_learn", stops)
            graphq.calibrate(prepared(model, settings), DATA, progress=False, store=store)
        assert 0 < len(files(store)) < 7
    assert len(calls) == 4 and calls[3] == calls[2]  # the second run learned nothing before it went on

    def counted(self, *args):
        calls.append(args[0].start.name)
        learn(self, *args)

    graph = prepared(Logits(from_disk(build, checkpoint)), settings)
    with monkeypatch.context() as patch:
        patch.setattr(autoround_module._Walk, "_learn", counted)
        graphq.calibrate(graph, DATA, progress=False, store=store)
    assert calls[4] == calls[2] and not set(calls[4:]) & set(calls[:2])
    with torch.no_grad():
        assert torch.equal(graphq.fold_weights(graph)(DATA[0]), whole(DATA[0]))
        assert torch.equal(graphq.apply_stored(store, in_memory(checkpoint))(DATA[0]), whole(DATA[0]))
    lost = [[r.output_squared_error for r in graphq.weight_results(g)] for g in (graph, whole)]
    assert lost[0] == lost[1] and len(lost[0]) == 7
