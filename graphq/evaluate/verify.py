"""verify: is what was simulated what the runtime computes?

The simulation is the converted graph lowered to the exact integer arithmetic of the target's kernels.

Op by op: it is interpreted with the runtime's own codes in place of every quantized tensor, so that each op
sees the inputs that the runtime's kernel saw, and an error shows at the op that makes it (products with packed weights,
or with inputs quantized at run time, are compared as floats, on the runtime's own inputs); the outputs that come of it
judge the float ops behind the last codes. End to end: the simulation and a default session run freely, and their
outputs are compared. Where float ops stand between the integer kernels, their last bits turn codes at rounding ties,
and every turned code moves all that follows; so that figure is to be read beside the floor (how far the runtime is from
itself when its optimizer is off), and beside the figure of the kernels alone: the same with the float ops left to the
runtime, in which every difference is a kernel that is simulated wrongly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphq.calibration.batches import batches_of, check_batch
from graphq.errors import CalibrationError, RuntimeMismatch
from graphq.evaluate.blame import cause
from graphq.evaluate.inductor import compile_program, load_program
from graphq.evaluate.islands import SimulatedKernels
from graphq.evaluate.openvino import OpenVino
from graphq.evaluate.taps import Taps, load_model, session
from graphq.graph.capture import flat_inputs
from graphq.graph.devices import CPU, on_cpu
from graphq.graph.dynamic_ops import DYNAMIC_QGEMM, TOKEN_QGEMM
from graphq.graph.integer_ops import name_in_file
from graphq.graph.nbits_ops import MATMUL_NBITS
from graphq.graph.ops import QUANTIZE
from graphq.graph.recurrent_ops import LSTM
from graphq.graph.several import expect_one
from graphq.numerics.affine import sqnr

PRODUCTS = (MATMUL_NBITS, DYNAMIC_QGEMM, TOKEN_QGEMM)  # with float inputs and results
AGREES = 60.0  # dB; float32 ops in another order are above 90, a wrong op is below 40


@dataclass
class TensorCheck:
    """One quantized tensor, over all the data: elements seen, how many codes differ, by how much at most, and why."""

    name: str
    kernel: str
    elements: int = 0
    differ: int = 0
    largest: int = 0
    cause: str = ""

    @property
    def share_equal(self) -> float:
        return 1.0 - self.differ / max(self.elements, 1)


@dataclass
class ProductCheck:
    """One product with float inputs (packed weights, or inputs quantized in the kernel), over all the data: the
    simulated kernel against the runtime's, on its inputs."""

    name: str
    signal: float = 0.0
    noise: float = 0.0

    @property
    def sqnr(self) -> float:
        """dB."""
        if not math.isfinite(self.signal + self.noise) or (self.noise and not self.signal):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise) if self.noise else math.inf


def db(value: float) -> str:
    """Decibels as text."""
    return "exact" if math.isinf(value) and value > 0 else f"{value:.1f} dB"


@dataclass(repr=False)
class Verification:
    """The result of `verify`; printed it is one line. first_diverging: the first tensor, in order, that is off by more
    than 1 LSB."""

    tensors: list[TensorCheck] = field(default_factory=list)
    products: list[ProductCheck] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)  # quantized in the graph, optimized away in the runtime
    output_sqnr: float = float("inf")  # dB, simulation against a default session, end to end
    kernels_sqnr: float = float("inf")  # dB, the same with the float ops between the kernels left to the runtime
    floats_sqnr: float = float("inf")  # dB, outputs of the simulation on the runtime's own codes
    executed_sqnr: float | None = None  # dB, simulation against OpenVINO or torch.compile, where that is the target
    floor_sqnr: float = float("inf")  # dB, a session without optimizations against the default session
    same_as_default_session: bool = True

    @property
    def share_equal(self) -> float:
        return 1.0 - sum(t.differ for t in self.tensors) / max(sum(t.elements for t in self.tensors), 1)

    @property
    def largest(self) -> int:
        return max((t.largest for t in self.tensors), default=0)

    @property
    def first_diverging(self) -> TensorCheck | None:
        return next((t for t in self.tensors if t.largest > 1), None)

    @property
    def agrees(self) -> bool:
        """Does the runtime compute what was simulated: kernels within 1 LSB, alone and in a row, and float ops?"""
        figures = (self.kernels_sqnr, self.floats_sqnr, *(p.sqnr for p in self.products))
        return self.first_diverging is None and all(f >= AGREES for f in figures)

    def __repr__(self) -> str:
        first = self.first_diverging
        head = "verified" if self.agrees else "DIVERGES"
        if first is not None:
            head += f" first at {first.name} ({first.kernel}, {first.largest} LSB: {first.cause})"
        parts = []
        if self.tensors or not (self.products or self.executed_sqnr is not None):
            parts.append(
                f"{self.share_equal:.4%} of the codes of {len(self.tensors)} quantized tensors equal, the rest off by "
                f"at most {self.largest} LSB"
            )
        if self.products:
            worst = min(p.sqnr for p in self.products)
            parts.append(f"{len(self.products)} products with packed weights equal to {db(worst)}")
        if self.executed_sqnr is not None:
            parts.append(f"the runtime gives what was simulated to {db(self.executed_sqnr)}")
        return (
            f"{head}: {'; '.join(parts)}; float ops on the runtime's codes {db(self.floats_sqnr)}; end to end: kernels "
            f"alone {db(self.kernels_sqnr)}, with float ops in torch {db(self.output_sqnr)} (the runtime against "
            f"itself without its optimizer {db(self.floor_sqnr)})"
        )

    def to_dict(self) -> dict[str, Any]:
        first = self.first_diverging
        return {
            "tensors": len(self.tensors),
            "products": len(self.products),
            "products_sqnr_db": min((p.sqnr for p in self.products), default=float("inf")),
            "unseen": self.unseen,
            "share_equal": self.share_equal,
            "largest_lsb": self.largest,
            "output_sqnr_db": self.output_sqnr,
            "kernels_sqnr_db": self.kernels_sqnr,
            "floats_sqnr_db": self.floats_sqnr,
            "agrees": self.agrees,
            "executed_sqnr_db": self.executed_sqnr,
            "floor_sqnr_db": self.floor_sqnr,
            "first_diverging": first.name if first else None,
            "cause": first.cause if first else None,
            "same_as_default_session": self.same_as_default_session,
        }


def verify(converted: fx.GraphModule, path: str | Path, data: Any) -> Verification:
    """Compare a converted graph with the ONNX file that was exported from it, on real inputs, in ONNX Runtime.

    Files for other runtimes are taken at their word: without an optimizer, op by op; those for OpenVINO are also run by
    it, end to end. A graph on another device is verified as a copy on the CPU, where the runtimes are.
    """
    expect_one(converted, "verify")
    converted = on_cpu(converted)
    if converted.meta["graphq_target"].executor == "inductor":
        return _verify_program(converted, path, data)
    target = converted.meta["graphq_target"]
    quantized = [n.name for n in converted.graph.nodes if n.target is QUANTIZE and not _at_run_time(n)]
    _expect_from(quantized, load_model(path), path)
    simulation, optimize = target.reference(converted), target.executor == "onnxruntime"
    executor = OpenVino(path) if target.executor == "openvino" else None
    # with more threads the kernel of an LSTM gives each some rows of the batch, and finds scales for those alone
    threads = 1 if any(n.target is LSTM for n in converted.graph.nodes) else 0
    taps = Taps(path, quantized, optimize=optimize, threads=threads)
    default, plain = (session(path, optimize=o, threads=threads) for o in (optimize, False))
    checks = {name: TensorCheck(name, taps.kernels[name]) for name in taps.names if name in quantized}
    simulated = {name_in_file(n) for n in simulation.graph.nodes if n.target in PRODUCTS}
    simulated |= set(taps.outputs)
    products = {name: ProductCheck(name) for name in taps.products if name in simulated}
    result = Verification(list(checks.values()), list(products.values()), [n for n in quantized if n not in checks])
    kernels = SimulatedKernels(simulation, taps)
    inputs_of_file = [i.name for i in default.get_inputs()]
    runs: dict[str, list[list[Tensor]]] = {
        k: [] for k in ("runtime", "tapped", "simulation", "kernels", "floats", "floor", "executed")
    }
    for number, (args, kwargs) in enumerate(batches_of(data, CPU)):
        check_batch(converted, args, kwargs, number)
        feed = feed_of(converted, args, kwargs)
        if len(feed) == len(inputs_of_file):  # an input that is an output too has another name there
            feed = dict(zip(inputs_of_file, feed.values(), strict=True))
        codes, tapped_outputs = taps.run(feed)
        with torch.no_grad():
            inputs = flat_inputs(converted, args, kwargs)
            runs["floats"].append(flat_outputs(_Forced(simulation, taps, codes, checks, products).run(*inputs)))
            runs["kernels"].append(kernels.outputs(feed, inputs))
            runs["simulation"].append(flat_outputs(simulation(*args, **kwargs)))
        runs["tapped"].append([torch.from_numpy(o) for o in tapped_outputs])
        if executor is not None:
            runs["executed"].append([torch.from_numpy(o) for o in executor.run(feed)])
        outputs = default.run(None, feed)
        result.same_as_default_session &= all(
            np.array_equal(a, b, equal_nan=True) for a, b in zip(tapped_outputs, outputs, strict=True)
        )
        runs["runtime"].append([torch.from_numpy(o) for o in outputs])
        runs["floor"].append([torch.from_numpy(o) for o in plain.run(None, feed)])
    if not runs["runtime"]:
        raise CalibrationError("there is no data to verify with", remedy="Give an iterable of batches.")
    figures = [_worst(runs["runtime"], runs[k]) for k in ("simulation", "floats", "floor")]
    kernels_alone = _worst(runs["tapped"], runs["kernels"])  # a default session lays out float convolutions anew
    result.output_sqnr, result.floats_sqnr, result.floor_sqnr = figures
    result.kernels_sqnr = kernels_alone
    if executor is not None:
        result.executed_sqnr = _worst(runs["executed"], runs["simulation"])
    return result


def _expect_from(quantized: list[str], model: onnx.ModelProto, path: str | Path) -> None:
    """Raises RuntimeMismatch for the file of another graph."""
    present = {name for node in model.graph.node for name in node.output}
    if quantized and not present.intersection(quantized):
        raise RuntimeMismatch(
            "the file was not exported from this graph: no quantized tensor has a name in common",
            where=str(path),
            remedy="Export the graph again and verify that file.",
        )


def _verify_program(converted: fx.GraphModule, path: str | Path, data: Any) -> Verification:
    """The program of a file as it is written and as torch.compile runs it, against the simulation."""
    program, compiled = load_program(path).module(), compile_program(path)
    simulation = converted.meta["graphq_target"].reference(converted)
    runs: dict[str, list[list[Tensor]]] = {k: [] for k in ("simulation", "program", "compiled")}
    for number, (args, kwargs) in enumerate(batches_of(data, CPU)):
        check_batch(converted, args, kwargs, number)
        with torch.no_grad():
            for name, run in (("simulation", simulation), ("program", program), ("compiled", compiled)):
                runs[name].append(flat_outputs(run(*args, **kwargs)))
    if not runs["program"]:
        raise CalibrationError("there is no data to verify with", remedy="Give an iterable of batches.")
    written = _worst(runs["program"], runs["simulation"])
    executed = _worst(runs["compiled"], runs["simulation"])
    return Verification(output_sqnr=written, floats_sqnr=written, kernels_sqnr=written, executed_sqnr=executed)


def _at_run_time(quantize: fx.Node) -> bool:
    """Is the scale found anew at every call, inside the kernel that reads the codes?"""
    scale = quantize.args[1]
    return isinstance(scale, fx.Node) and scale.op != "get_attr"


def _worst(reference: list[list[Tensor]], other: list[list[Tensor]]) -> float:
    """The lowest SQNR (dB) over the outputs, each taken over all batches."""
    pairs = [
        [torch.cat([batch[i].flatten() for batch in side]) for side in (reference, other)]
        for i in range(len(reference[0]))
    ]
    return min(sqnr(a, b) for a, b in pairs)


class _Forced(fx.Interpreter):
    """Interprets the graph with the runtime's codes and products in place of the simulated ones, and counts where they
    differ."""

    def __init__(
        self,
        gm: fx.GraphModule,
        taps: Taps,
        codes: dict[str, np.ndarray],
        checks: dict[str, TensorCheck],
        products: dict[str, ProductCheck],
    ) -> None:
        super().__init__(gm)
        self.sources, self.codes, self.checks, self.products = taps.products, codes, checks, products
        named = zip(output_nodes(gm), taps.outputs, strict=False)
        self.outputs_of = dict(reversed(list(named)))  # what is given twice has its first name

    def run_node(self, n: fx.Node) -> Any:
        name = self.outputs_of.get(n) or name_in_file(n)
        if n.target in PRODUCTS and name in self.products:
            return self._product(n, self.products[name])
        value = super().run_node(n)
        if name not in self.checks:
            return value
        given = torch.from_numpy(self.codes[name])
        apart = _distance(value, given, n)
        check = self.checks[name]
        check.elements += apart.numel()
        check.differ += int((apart > 0).sum())
        furthest = int(apart.max()) if apart.numel() else 0
        if furthest > check.largest:
            check.largest = furthest
            check.cause = cause(n, *self.fetch_args_kwargs_from_env(n), given, apart)
        return given if given.dtype == value.dtype else value

    def _product(self, n: fx.Node, check: ProductCheck) -> Tensor:
        (x, *rest), options = self.fetch_args_kwargs_from_env(n)
        source = self.sources[check.name]
        x = torch.from_numpy(self.codes[source]) if source in self.codes else x
        given = torch.from_numpy(self.codes[check.name])
        check.signal += given.double().square().sum().item()
        computed: Tensor = n.target(x, *rest, **options)  # type: ignore[operator]
        check.noise += (computed.double() - given.double()).square().sum().item()
        return given


def _distance(simulated: Tensor, given: Tensor, node: fx.Node) -> Tensor:
    if simulated.shape != given.shape:
        raise RuntimeMismatch(
            f"shapes differ: {list(simulated.shape)} here, {list(given.shape)} in the runtime", where=node.name
        )
    shift = 128 if (simulated.dtype, given.dtype) == (torch.int8, torch.uint8) else 0  # x86 turns s8 into u8
    return (simulated.int() + shift - given.int()).abs()


def output_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that make the graph's outputs, in order."""
    results = next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0]
    return [n for n in pytree.tree_leaves(results) if isinstance(n, fx.Node)]


def feed_of(gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray]:
    """Inputs by the names that the ONNX file gives them: those of the placeholders."""
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    given = zip(names, flat_inputs(gm, args, kwargs), strict=True)
    return {k: v.cpu().numpy() for k, v in given if isinstance(v, Tensor)}


def flat_outputs(value: Any) -> list[Tensor]:
    """The tensors of a model's output, in order."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
