"""Weights that algorithms have chosen, in a folder: what lets a run be resumed, and keeps weights out of memory.

One safetensors file for each weight, named after its parameter, with codes, scales, zero points and, in its metadata, a
WeightResult. A file is there whole or not at all; about.json says which run the folder belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from graphq.algorithms.base import ALGORITHMS
from graphq.algorithms.packed import Packed, once
from graphq.algorithms.results import WeightResult
from graphq.algorithms.rows import weight_of
from graphq.algorithms.scaling import FACTORS, WORD
from graphq.config.spec import QuantSpec
from graphq.errors import LoadError, StateError, did_you_mean
from graphq.graph.on_disk import SOURCE, digest_of, on_disk, placeholder, values_of
from graphq.numerics.affine import dequantize

ABOUT, PLAN, SUFFIX = "about.json", "plan.json", ".weight.safetensors"
TRANSPOSED = "t"
WORDS = (WORD, "corrected", "guarded", TRANSPOSED)
SCALES, OTHERS = "scales-{}.safetensors", "others.safetensors"


@dataclass(frozen=True)
class ChosenWeight:
    """One weight in a store. parameter: its name in the model. spec: of its codes."""

    path: Path

    def read(self) -> Tensor:
        """The weight [out, in, …], float32."""
        part = self.tensors()
        spec, shape = self.spec, json.loads(self.about["shape"])
        matrix = dequantize(part["codes"], part["scale"], part["zero_point"], self.block, spec.number_format)
        return weight_of(matrix, shape, self.about["family"])

    def packed(self, turned: bool) -> Packed:
        """As a parametrization of a layer, of a weight that is transposed there or not."""
        part, shape = self.tensors(), json.loads(self.about["shape"])
        qparams = (part["scale"], part["zero_point"])
        return Packed(part["codes"], *qparams, self.block, self.spec.number_format, shape, self.about["family"],
                      turned=turned)  # fmt: skip

    @property
    def about(self) -> dict[str, str]:
        """What the file says of itself. Raises LoadError for a damaged one."""
        return _metadata(self.path)

    @property
    def parameter(self) -> str:
        return self.about["parameter"]

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(**json.loads(self.about["spec"]))

    @property
    def result(self) -> WeightResult:
        return WeightResult(**json.loads(self.about["result"]))

    @property
    def block(self) -> tuple[int, ...]:
        return tuple(json.loads(self.about["block"]))

    def tensors(self) -> dict[str, Tensor]:
        """codes [out, K], scale and zero_point one for each block of `spec`, overall []. Raises LoadError."""
        part = _read_file(self.path)
        part["zero_point"] = part["zero_point"].to(torch.int32).expand_as(part["scale"])
        return part


@dataclass(frozen=True)
class _Part:
    """Scale, or zero point, of a stored weight."""

    weight: ChosenWeight
    key: str

    def read(self) -> Tensor:
        return self.weight.tensors()[self.key]


class WeightStore:
    """See above. run: what tells one run from another. Raises StateError for a folder of another run."""

    def __init__(self, folder: str | Path, run: dict[str, Any]) -> None:
        self.folder = Path(folder)
        text = json.dumps(run)  # in its order: the last selector that fits counts
        about = {"graphq_weights": 1, "run": hashlib.sha256(text.encode()).hexdigest(), "config": run["config"]}
        if self.folder.exists() and any(p.suffix != ".part" for p in self.folder.iterdir()):  # what a kill has left
            if not (self.folder / ABOUT).is_file():
                raise StateError("this folder is not empty, and holds no weights of a run", where=str(self.folder),
                                 remedy="Name a new one.")  # fmt: skip
            found = _read_about(self.folder)
            if found.get("run") != about["run"]:
                raise StateError(
                    "this folder holds the weights of another run: of another config, model or data",
                    where=str(self.folder),
                    remedy="Name a new folder, or delete this one; data that are shuffled differ every time.",
                )
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / ABOUT, json.dumps(about, indent=1).encode())

    def get(self, parameter: str) -> ChosenWeight | None:
        """The weight, if an earlier run has chosen it."""
        path = self.folder / f"{parameter}{SUFFIX}"
        return ChosenWeight(path) if path.is_file() else None

    def put(
        self, parameter: str, codes: Tensor, scale: Tensor, zero: Tensor, overall: Tensor, original: Tensor,
        block: tuple[int, ...], spec: QuantSpec, family: str, result: WeightResult,
    ) -> ChosenWeight:  # fmt: skip
        """Keep a weight: codes [out, K] of the original, in the order of its family of ops. overall: its largest
        magnitude, or that of those that share a scale with it."""
        tensors = {"codes": codes, "scale": scale, "zero_point": once(zero).to(torch.int32), "overall": overall}
        about = {
            "parameter": parameter,
            "family": family,
            "shape": json.dumps(list(original.shape)),
            "original": digest_of(original),
            "block": json.dumps(list(block)),
            "spec": spec.model_dump_json(),
            "result": json.dumps(result.to_dict()),
        }
        path = self.folder / f"{parameter}{SUFFIX}"
        _save(path, tensors, about)
        return ChosenWeight(path)

    def plan(self, weights: list[str], others: dict[str, str]) -> None:
        """Keep what a whole run will have chosen, and which other quantized weights are left alone, and why."""
        path = self.folder / PLAN
        known = json.loads(path.read_text()) if path.is_file() else {"weights": []}
        every = sorted({*known["weights"], *weights})
        plan = {"weights": every, "others": {name: why for name, why in others.items() if name not in every}}
        _write(path, json.dumps(plan, indent=1).encode())

    def get_scales(self, step: int, digests: dict[str, str]) -> dict[str, Tensor] | None:
        """What an earlier run has found in this step of its algorithms: scales of channels, by the tensor's name.
        digests: of the weights that read it. Raises StateError for those of another model."""
        path = self.folder / SCALES.format(step)
        if not path.is_file():
            return None
        if _metadata(path) != digests:
            raise StateError(
                "the store holds scales of another model",
                where=str(path),
                remedy="Name a new folder, or delete this one.",
            )
        return _read_file(path)

    def put_scales(self, step: int, scales: dict[str, Tensor], digests: dict[str, str]) -> None:
        _save(self.folder / SCALES.format(step), scales, digests)

    def put_others(self, tensors: dict[str, Tensor], weights: list[str]) -> None:
        """Keep parameters that took in scales and are not quantized (norms, biases), by their names in the graph.
        weights: the names of weights that did."""
        _save(self.folder / OTHERS, tensors, {"weights": json.dumps(weights)})


def placeholders(chosen: ChosenWeight, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(the weight, its scale, its zero point), all on disk."""
    part = chosen.tensors()
    scale, zero = (
        placeholder(part[key].shape, _Part(chosen, key), part[key].dtype, device) for key in ("scale", "zero_point")
    )
    return placeholder(json.loads(chosen.about["shape"]), chosen, device=device), scale, zero


def stored_weights(folder: str | Path) -> Iterator[ChosenWeight]:
    """The weights that a run with `store` has left in a folder. Raises LoadError where it has none."""
    folder = Path(folder)
    _read_about(folder)
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        yield ChosenWeight(path)


@torch.no_grad()
def apply_stored(folder: str | Path, model: nn.Module, *, packed: bool = False) -> nn.Module:
    """Put the weights of a store into a model, in place, dequantized; returns the model.

    packed: they stay codes, and are dequantized whenever their layer runs: less memory, more time, the same values.
    The model may then be one on disk (`from_disk`); what the store does not have is read into memory. Weights that the
    graph quantizes and no algorithm has chosen (an embedding) stay float, with a warning. Nothing is changed where one
    of them has no place there, or the run has not come to its end: LoadError.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    path, weights = Path(folder) / OTHERS, {w.parameter: w for w in stored_weights(folder)}
    others = _read_file(path) if path.is_file() else {}
    left = sorted(set(json.loads(_metadata(path)["weights"]) if path.is_file() else []) - set(weights))
    if left:
        raise LoadError(
            f"{len(left)} weights that took in scales are not chosen, and the norms before them are scaled",
            where=left[0],
            remedy="Let the run come to its end; where none chooses them, take the graph: graphq.fold_weights.",
        )
    _expect_whole(Path(folder), set(weights))
    given: list[tuple[str, list[int], Tensor | ChosenWeight]] = [(n, list(t.shape), t) for n, t in others.items()]
    given += [(w.parameter, json.loads(w.about["shape"]), w) for w in weights.values()]
    places = [_place_of(name, shape, parameters, disk=packed) for name, shape, _ in given]
    for (known, turned), (_, _, new) in zip(places, given, strict=True):
        if packed and isinstance(new, ChosenWeight):
            new.packed(turned).put_into(model, known)
            continue
        values = new.read() if isinstance(new, ChosenWeight) else new
        _set(known, values.T if turned else values)
    for parameter in model.parameters():
        if on_disk(parameter):
            _set(parameter, values_of(parameter))
    return model


def _expect_whole(folder: Path, chosen: set[str]) -> None:
    """Raises LoadError for a run that was stopped, and warns of weights that the graph rounds and the store has not."""
    path = folder / PLAN
    plan = json.loads(path.read_text()) if path.is_file() else {"weights": [], "others": {}}
    missing = sorted(set(plan["weights"]) - chosen)
    if missing:
        raise LoadError(
            f"the run has not come to its end: {len(missing)} of {len(plan['weights'])} weights are not chosen",
            where=f"{folder}: {missing[0]}",
            remedy="Call graphq.calibrate with this store again: it goes on from there.",
        )
    if plan["others"]:
        named = "; ".join(f"{name}: {why}" for name, why in plan["others"].items())
        warnings.warn(f"weights stay float that the graph rounds to the nearest: {named}", stacklevel=4)


def _set(parameter: nn.Parameter, values: Tensor) -> None:
    if not on_disk(parameter):
        parameter.copy_(values)
        return
    parameter.data = values.to(parameter.device, parameter.dtype).clone()
    delattr(parameter, SOURCE)


def _place_of(
    stored: str, shape: list[int], parameters: dict[str, nn.Parameter], *, disk: bool
) -> tuple[nn.Parameter, bool]:
    """(the model's parameter, whether it is transposed there). disk: it may be one."""
    name, turned = original_name(stored, parameters)
    if name is None and stored.rpartition(".")[2].startswith(FACTORS):
        raise LoadError("these scales of channels stand between two ops, and the model has no op there",
                        where=stored, remedy="Take the calibrated graph: graphq.fold_weights.")  # fmt: skip
    if name is None:
        raise LoadError("the model has no such parameter", where=stored, remedy=did_you_mean(stored, parameters))
    known = parameters[name]
    if on_disk(known) and not disk:
        raise LoadError("the model has this parameter on disk", where=stored,
                        remedy="Give the model that was traced, in memory, or say packed=True.")  # fmt: skip
    if list(known.shape) != (shape[::-1] if turned else shape):
        raise LoadError("the model has another shape of this parameter", where=stored,
                        remedy="Give the model that was traced.")  # fmt: skip
    return known, turned


def original_name(name: str, known: Mapping[str, Any]) -> tuple[str | None, bool]:
    """(the model's own name of a tensor, whether it is transposed there): what keeps its place appends words to it."""
    turned = False
    while name not in known:
        word = _last_word(name)
        if word is None:
            return None, False
        name, turned = name.removesuffix(f"_{word}"), turned ^ (word == TRANSPOSED)
    return name, turned


def bare_name(name: str) -> str:
    """Without the words that graphq appends."""
    while (word := _last_word(name)) is not None:
        name = name.removesuffix(f"_{word}")
    return name


def _last_word(name: str) -> str | None:
    words = sorted((*WORDS, *ALGORITHMS.names()), key=len, reverse=True)  # fpi_gptq before gptq
    return next((w for w in words if name.endswith(f"_{w}")), None)


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError) as e:
        raise LoadError(
            "this folder holds no weights of a run", where=str(folder), remedy="Give the store of graphq.calibrate."
        ) from e
    return about


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as e:
        raise LoadError(f"this file cannot be read: {e}", where=str(path), remedy="Delete the file.") from e


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata())
    except (OSError, SafetensorError, TypeError) as e:
        raise LoadError(f"this file cannot be read: {e}", where=str(path), remedy="Delete the file.") from e


def _save(path: Path, tensors: dict[str, Tensor], about: dict[str, str] | None = None) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, part, metadata=about)
    os.replace(part, path)


def _write(path: Path, content: bytes) -> None:
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)
