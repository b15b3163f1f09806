"""Quantization-aware training of a CNN on Fashion-MNIST: what W4A4 and W8A8 lose, and what training brings back.

python examples/qat_fashion_mnist.py [folder of the data set: Debian's package dataset-fashion-mnist]
"""

import gzip
import sys
from pathlib import Path

import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme

FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist")


def load(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = (
        gzip.decompress((FOLDER / f"{part}-{n}-ubyte.gz").read_bytes()) for n in ("images-idx3", "labels-idx1")
    )
    pixels = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).reshape(-1, 1, 28, 28)
    return (pixels / 255 - 0.286) / 0.353, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long()


def train(model: nn.Module, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // 128))
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128)[: len(x) // 128]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def report(name: str, model: nn.Module) -> None:
    right = sum(int((model(test_x[i : i + 500]).argmax(1) == test_y[i : i + 500]).sum()) for i in range(0, 10_000, 500))
    print(f"{name:9} {right / 100:.2f} %", flush=True)


torch.manual_seed(0)
(x, y), (test_x, test_y) = load("train"), load("t10k")
layers = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
layers += [nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
model = nn.Sequential(*layers, nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))
train(model, 4, 2e-3)
report("float", model.eval())
for bits in (4, 8):
    weight = QuantSpec(format=f"int{bits}", granularity="channel", narrow_range=True)
    given = QuantSpec(format=f"uint{bits}", symmetric=False, observer="mse")
    config = QuantConfig(rules=(Rule(select="linear | conv", scheme=Scheme(weight=weight, input=given)),))
    prepared = graphq.prepare(model, config, (x[:8],), target="simulation")
    calibrated = graphq.calibrate(prepared, x[:1024].split(128), progress=False)
    report(f"W{bits}A{bits} PTQ", calibrated)
    trained = graphq.qat(calibrated, scales="lsq")
    train(trained, 3, 1e-3)
    report(f"W{bits}A{bits} QAT", graphq.convert(trained))
