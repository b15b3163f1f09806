"""A step of two data-parallel processes on a prepared graph is that of one process on all of the data."""

import socket

import torch
import torch.distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import graphq
from graphq import QuantConfig, QuantSpec, Rule, Scheme


def trainable():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(32, 8)
    scheme = Scheme(
        weight=QuantSpec(format="int4", granularity="channel"), input=QuantSpec(format="uint4", symmetric=False)
    )
    config = QuantConfig(rules=(Rule(select="linear", scheme=scheme),))
    prepared = graphq.prepare(model, config, (x,), target="simulation")
    return graphq.qat(graphq.calibrate(prepared, [x], progress=False), scales="lsq"), x


def step(graph, parameters, x):
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    graph(x).square().mean().backward()
    optimizer.step()


def process(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    graph, x = trainable()
    parallel = DistributedDataParallel(graph)
    step(parallel, parallel.parameters(), x.chunk(2)[rank])
    results[rank] = {k: v.detach().clone() for k, v in graph.state_dict().items() if isinstance(v, torch.Tensor)}
    dist.destroy_process_group()


def test_ddp_trains_weights_and_scales_as_one_process_does():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(process, (port, results), nprocs=2)
        first, second = results[0], results[1]
    graph, x = trainable()
    before = {k: v.clone() for k, v in graph.state_dict().items() if isinstance(v, torch.Tensor)}
    step(graph, graph.parameters(), x)
    moved = 0
    for name, value in graph.state_dict().items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
            moved += not torch.equal(before[name], value)
    assert moved >= 6  # weights, biases and what is learned of the scales
