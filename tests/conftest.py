"""Shared by all tests: real models once per session, quiet third parties."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import graphq
import zoo
from graphq.graph.invariants import checking

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def checked():
    """Every pass of every test is checked: invariants before and after it, and what it promises."""
    with checking():
        yield


class Case:
    """A real model, quantized and exported once, with held-out data."""

    def __init__(self, model, calibration, held_out, dynamic, folder, name):
        self.model, self.calibration, self.held_out = model, calibration, held_out
        self.quantized = graphq.quantize(model, "int8", calibration, dynamic_shapes=dynamic, progress=False)
        self.path = graphq.export(self.quantized, folder / f"{name}.onnx")


@pytest.fixture(scope="session")
def effnet(tmp_path_factory):
    data, held = zoo.rows(zoo.photo_crops(32, seed=0)), zoo.rows(zoo.photo_crops(16, seed=1), 8)
    return Case(zoo.efficientnet_lite0(), data, held, "batch", tmp_path_factory.mktemp("effnet"), "effnet")


@pytest.fixture(scope="session")
def minilm(tmp_path_factory):
    data, held = zoo.rows(zoo.sentences(32, seed=0)), zoo.rows(zoo.sentences(16, seed=1), 8)
    return Case(zoo.minilm(), data, held, "batch+sequence", tmp_path_factory.mktemp("minilm"), "minilm")
