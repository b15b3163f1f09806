"""Every kind of model becomes an ATen graph that knows where each op comes from."""

import pytest
import torch
from torch import fx, nn

import graphq
from graphq.errors import CaptureError
from graphq.graph.capture import example_of
from graphq.graph.view import layers

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def test_every_op_knows_its_module_path_and_class():
    found = {(v.family, v.path, v.type.rpartition(".")[2]) for v in layers(graphq.capture(Net(), (X,)))}
    assert {("conv", "body.0", "Conv2d"), ("relu", "body.2", "ReLU"), ("linear", "head", "Linear")} <= found


def test_module_symbolic_trace_and_saved_program_give_the_same_quantized_results(tmp_path):
    model = Net().eval()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "net.pt2")
    sources = [model, fx.symbolic_trace(model), torch.export.load(tmp_path / "net.pt2")]
    results = [graphq.quantize(s, "int8", [X, X + 1], progress=False)(X) for s in sources]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_model_is_left_as_it_was():
    model = Net().train()
    model.body[3].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graphq.quantize(model, "int8", [X], progress=False)
    assert model.training and not model.body[3].training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_batch_and_sequence_stay_dynamic():
    class Twice(nn.Module):
        def forward(self, ids, mask):
            return ids.float() * mask

    ids = torch.ones(1, 5, dtype=torch.long)
    gm = graphq.capture(Twice(), kwargs={"ids": ids, "mask": ids}, dynamic_shapes="batch+sequence")
    assert set(example_of(gm).dynamic_shapes) == {"ids", "mask"}
    assert gm(ids=torch.ones(4, 9, dtype=torch.long), mask=torch.ones(4, 9, dtype=torch.long)).shape == (4, 9)


def test_a_module_called_twice_is_two_ops_of_one_path_with_one_weight():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    model, x = Shared(), torch.randn(3, 4)
    quantized = graphq.quantize(model, "int8", [x], progress=False)
    rows = graphq.explain(quantized)["fc"]
    assert [r.action for r in rows] == ["quantize", "quantize"]
    assert sum("codes" in n and "weight" in n for n, _ in quantized.named_buffers()) == 1
    assert graphq.compare(model, quantized, [x]).sqnr > 25


def test_tied_weights_are_quantized_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    quantized = graphq.quantize(Tied(), "int8", [torch.randn(3, 6)], progress=False)
    assert sum("weight" in n and n.endswith("codes") for n, _ in quantized.named_buffers()) == 1


def test_control_flow_on_data_is_named_with_its_line():
    class Branch(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(CaptureError) as e:
        graphq.capture(Branch(), (X,))
    assert "control flow depends on the values" in e.value.what
    assert "test_capture.py" in e.value.where and "x.sum() > 0" in e.value.where
    assert "torch.where" in e.value.remedy


def test_a_dimension_that_the_model_fixes_is_named():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(2, -1) + torch.zeros(2, 192)

    with pytest.raises(CaptureError, match="dynamic"):
        graphq.capture(Fixed(), (X,))
    assert graphq.capture(Fixed(), (X,), dynamic_shapes=None)(X).shape == (2, 192)


def test_tracing_without_an_example_is_an_error():
    with pytest.raises(CaptureError, match="example input"):
        graphq.capture(Net())
