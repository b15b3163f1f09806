"""Quantization-aware training of a CNN on Fashion-MNIST: what W4A4 and W8A8 lose, and what training brings back.

    python examples/qat_fashion_mnist.py [--data DIR] [--epochs 4] [--qat-epochs 3] [--images 60000] [--json FILE]

DIR holds the four gzip files of the data set (Debian package dataset-fashion-mnist; `apt-get download` and `dpkg -x`
do without root).
"""

import argparse
import gzip
import json
from pathlib import Path

import torch
from torch import nn

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--qat-epochs", type=int, default=3)
parser.add_argument("--images", type=int, default=60_000)
parser.add_argument("--json", type=Path)
options = parser.parse_args()
torch.manual_seed(0)


def read(name: str, header: int) -> torch.Tensor:
    path = options.data / f"{name}-ubyte.gz"
    if not path.exists():
        raise SystemExit(f"{path} is not there: {__doc__}")
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())[header:]), dtype=torch.uint8)


def load(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = read(f"{part}-images-idx3", 16).reshape(-1, 1, 28, 28).float() / 255
    return (images - 0.286) / 0.353, read(f"{part}-labels-idx1", 8).long()


def train(model: nn.Module, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    steps = epochs * (len(x) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128)[: len(x) // 128]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    right = sum(
        (model(a).argmax(1) == b).sum().item() for a, b in zip(test_x.split(500), test_y.split(500), strict=True)
    )
    return 100 * right / len(test_y)


def block(inside: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(inside, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]


(x, y), (test_x, test_y) = load("train"), load("t10k")
x, y = x[: options.images], y[: options.images]
model = nn.Sequential(*block(1, 32), *block(32, 64), nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))
train(model, options.epochs, 2e-3)
results = {"float": accuracy(model.eval())}
for bits in (4, 8):
    weight = QuantSpec(format=f"int{bits}", granularity="channel", narrow_range=True)
    given = QuantSpec(format=f"uint{bits}", symmetric=False, observer="mse")
    config = QuantConfig(rules=(Rule(select="linear | conv", scheme=Scheme(weight=weight, input=given)),))
    prepared = graphq.prepare(model, config, (x[:8],), target="simulation")
    calibrated = graphq.calibrate(prepared, x[:1024].split(128), progress=False)
    results[f"W{bits}A{bits} PTQ"] = accuracy(calibrated)
    trained = graphq.qat(calibrated, scales="lsq")
    train(trained, options.qat_epochs, 1e-3)
    results[f"W{bits}A{bits} QAT"] = accuracy(graphq.convert(trained))
for name, value in results.items():
    print(f"{name:10} {value:6.2f} %  {value - results['float']:+.2f}")
if options.json:
    options.json.write_text(json.dumps(results, indent=2))
