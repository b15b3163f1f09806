"""What is saved is loaded bit for bit, at every stage; what is damaged or belongs to another model is refused."""

import json

import pytest
import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme
from graphq.errors import ExportError, LoadError, StateError
from graphq.storage import ABOUT, TENSORS
from tests.test_qat import Net, config, train

INT8 = {
    "weight": QuantSpec(format="int8", granularity="channel", narrow_range=True),
    "given": QuantSpec(format="uint8", symmetric=False, observer="mse"),
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(32, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def prepared(model, target="simulation", **options):
    made = config(**(options or INT8)).model_copy(update={"bias_correction": True})
    return graphq.prepare(model, made, (X,), target=target)


def calibrate(graph):
    return graphq.calibrate(graph, X.split(8), progress=False)


def same(a, b):
    assert torch.equal(a(X), b(X))
    tensors = {k: v for k, v in b.state_dict().items() if isinstance(v, torch.Tensor)}
    for k, v in a.state_dict().items():
        if isinstance(v, torch.Tensor):
            assert torch.equal(v, tensors[k]), k


@pytest.mark.parametrize("cpu", ["avx2", "vnni"])
def test_calibration_conversion_and_export_go_on_bit_for_bit(model, tmp_path, cpu):
    target = graphq.get_target("onnxruntime", cpu=cpu)
    straight = prepared(model, target)
    loaded = graphq.load(graphq.save(straight, tmp_path / "prepared"), model)
    calibrate(straight), calibrate(loaded)
    same(straight, loaded)
    loaded = graphq.load(graphq.save(straight, tmp_path / "calibrated"), model)
    same(straight, loaded)
    converted, again = graphq.convert(straight), graphq.convert(loaded)
    same(converted, again)
    loaded = graphq.load(graphq.save(converted, tmp_path / "converted"), model)
    same(converted, loaded)
    assert [r.reason for r in graphq.explain(loaded).rows]
    first, second = (graphq.export(g, tmp_path / f"{n}.onnx") for n, g in (("a", converted), ("b", loaded)))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("scales", ["frozen", "lsq", "lsq+", "tqt"])
def test_training_goes_on_bit_for_bit(model, tmp_path, scales):
    straight = graphq.qat(calibrate(prepared(model)), scales, clip=False)
    wanted = torch.zeros(32, 4)
    train(straight, X, wanted, steps=3)
    loaded = graphq.load(graphq.save(straight, tmp_path / "training"), model)
    assert loaded.training
    same(straight, loaded)
    train(straight, X, wanted, steps=3), train(loaded, X, wanted, steps=3)
    same(straight, loaded)
    same(graphq.convert(straight), graphq.convert(loaded))


@pytest.mark.parametrize(
    ("weight", "given"),
    [
        (QuantSpec(format="nvfp4", ragged=True), QuantSpec(format="nvfp4", dynamic="local", ragged=True)),
        (QuantSpec(format="mxfp4", ragged=True), QuantSpec(format="int8", granularity="token", dynamic=True)),
        (QuantSpec(format="int4", granularity="channel", then=QuantSpec(format="fp8_e4m3")), None),
        (QuantSpec(format="fp8_e5m2"), QuantSpec(format="fp8_e4m3")),
    ],
)
def test_every_kind_of_spec_is_restored(tmp_path, weight, given):
    layer = nn.Sequential(nn.Linear(48, 16), nn.Linear(16, 16)).eval()
    x = torch.randn(8, 48)
    made = QuantConfig(rules=(Rule(select="linear", scheme=Scheme(weight=weight, input=given)),))
    graph = graphq.calibrate(graphq.prepare(layer, made, (x,), target="simulation"), [x], progress=False)
    for number, stage in enumerate((graph, graphq.convert(graph))):
        loaded = graphq.load(graphq.save(stage, tmp_path / str(number)), layer)
        assert torch.equal(loaded(x), stage(x))


def test_the_model_and_the_saved_folder_stay_as_they_are(model, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = calibrate(prepared(model, graphq.get_target("onnxruntime", cpu="avx2")))
    folder = graphq.save(graph, tmp_path / "g")
    assert {p.name for p in folder.iterdir()} == {ABOUT, TENSORS}
    graphq.save(graph, folder)  # over itself
    assert list(tmp_path.iterdir()) == [folder]
    loaded = graphq.load(folder, model)
    train(graphq.qat(loaded), X, torch.zeros(32, 4), steps=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def edit(**changes):
    def damage(folder):
        about = json.loads((folder / ABOUT).read_text())
        (folder / ABOUT).write_text(json.dumps(about | changes))

    return damage


def flip(name, at):
    def damage(folder):
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1
        (folder / name).write_bytes(bytes(data))

    return damage


def cut(name, keep):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def swap(folder):
    (folder / TENSORS).write_bytes((folder / ABOUT).read_bytes())


DAMAGE = {
    "no description": (lambda f: (f / ABOUT).unlink(), "missing"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "missing"),
    "description cut": (cut(ABOUT, 0.5), "damaged"),
    "tensors cut": (cut(TENSORS, 0.9), "checksum"),
    "tensors emptied": (cut(TENSORS, 0), "checksum"),
    "one bit of a tensor": (flip(TENSORS, -5), "checksum"),
    "one bit of the header": (flip(TENSORS, 12), "checksum"),
    "another stage": (edit(stage="converted"), "checksum"),
    "another version": (edit(graphq=99), "version 99"),
    "another config": (edit(config={"rules": []}), "checksum"),
    "no checksums": (lambda f: (f / ABOUT).write_text("{}"), "damaged"),
    "another file": (swap, "checksum"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_with_the_reason(model, tmp_path, name):
    folder = graphq.save(calibrate(prepared(model)), tmp_path / "g")
    damage, complaint = DAMAGE[name]
    damage(folder)
    with pytest.raises(LoadError, match=complaint) as e:
        graphq.load(folder, model)
    assert str(folder) in str(e.value)


def test_another_model_is_refused_with_the_first_difference(model, tmp_path):
    folder = graphq.save(calibrate(prepared(model)), tmp_path / "g")

    class Other(Net):
        def forward(self, x):
            return super().forward(torch.tanh(x))

    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(128, 4)

    for other in (Other(), Wider()):
        with pytest.raises(LoadError, match="model"):
            graphq.load(folder, other.eval())


def test_what_cannot_be_saved_says_why(model, tmp_path):
    with pytest.raises(StateError, match="prepared"):
        graphq.save(graphq.capture(model, (X,)), tmp_path / "g")
    with pytest.raises(StateError, match="folded"):
        graphq.save(graphq.fold_weights(calibrate(prepared(model))), tmp_path / "g")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(ExportError, match="something else"):
        graphq.save(prepared(model), tmp_path / "mine")


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(16, 16)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x).relu())


@pytest.mark.parametrize("cpu", ["vnni", "avx2"])
def test_a_module_called_twice_is_restored_with_both_of_its_corrected_biases(cpu, tmp_path):
    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(32, 16)
    target = graphq.get_target("onnxruntime", cpu=cpu)
    graph = graphq.calibrate(graphq.prepare(model, "int8", (x,), target=target), [x], progress=False)
    loaded = graphq.load(graphq.save(graph, tmp_path / "g"), model)
    assert torch.equal(graphq.convert(loaded)(x), graphq.convert(graph)(x))
    names = [{n for n, _ in graphq.qat(g).named_parameters()} for g in (graph, loaded)]
    assert names[0] == names[1]
