"""Weights that read one tensor have one scale over their NVFP4 block scales; they are found in the graph."""

import torch
from torch import nn

import graphq
from graphq.numerics.formats import get_format
from graphq.numerics.scales import choose_qparams
from graphq.quantizer import quantizers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha, self.beta, self.gamma = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.out, self.left, self.right = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        h = self.out(torch.softmax(self.alpha(x) * self.beta(x), -1) * self.gamma(x)) + x
        return torch.sigmoid(self.left(h)) * self.right(h)


def test_linears_on_one_tensor_share_the_global_scale_and_no_others_do():
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(4, 32)
    with torch.no_grad():
        model.beta.weight *= 5
        model.right.weight *= 3
    graph = graphq.calibrate(graphq.prepare(model, "NVFP4", (x,), target="simulation"), [x], progress=False)
    found = {q.label.removesuffix(".weight"): q for q in quantizers(graph).values() if q.constant}
    largest = {name: q.overall.item() for name, q in found.items()}
    amax = {name: getattr(model, name).weight.abs().max().item() for name in found}
    assert largest["alpha"] == largest["beta"] == largest["gamma"] == amax["beta"]
    assert largest["left"] == largest["right"] == amax["right"]
    assert largest["out"] == amax["out"]
    w = model.alpha.weight.detach().reshape(32, 2, 16)
    wanted, _ = choose_qparams(
        w.amin(-1), w.amax(-1), get_format("fp4_e2m1"), symmetric=True, scale="e4m3", overall=torch.tensor(amax["beta"])
    )
    assert torch.equal(found["alpha"].scale, wanted)
    assert torch.equal(graphq.convert(graph)(x), graph(x))
