"""Tensors that stay on disk until an op needs them.

Such a tensor is a placeholder: of the right shape and dtype, without memory of its own, and NaN in every element, so
that a use that forgets to read it cannot go unseen. `values_of` reads what it stands for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graphq.errors import LoadError, did_you_mean

SOURCE = "graphq_source"  # attribute of a placeholder
FLOATS = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"


class Source(Protocol):
    """Where a tensor is."""

    def read(self) -> Tensor:
        """The tensor, from disk."""


@dataclass(frozen=True)
class InFile:
    """A tensor of a safetensors file, as float32."""

    path: Path
    key: str

    def read(self) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as file:  # closed again: what was read is not kept mapped
                return file.get_tensor(self.key).float()
        except (OSError, SafetensorError) as e:
            raise LoadError(f"the weights cannot be read: {e}", where=f"{self.path}: {self.key}") from e


@dataclass(frozen=True)
class Scaled:
    """A tensor on disk times factors, or divided by them, which go with it by broadcasting."""

    source: Source
    factors: Tensor
    divide: bool

    def read(self) -> Tensor:
        values = self.source.read()
        factors = self.factors.to(values.device)
        return values / factors if self.divide else values * factors


def digest_of(tensor: Tensor) -> str:
    """Of values and shape."""
    values = values_of(tensor).detach().cpu().float().contiguous()
    digest = hashlib.sha256(f"{list(values.shape)}".encode())
    digest.update(values.numpy().data)  # as it lies in memory: an embedding's bytes are many
    return digest.hexdigest()


def scaled(tensor: Tensor, factors: Tensor, *, divide: bool = False) -> Tensor:
    """The tensor times factors, or divided by them, in its dtype; one on disk stays there."""
    source: Source | None = getattr(tensor, SOURCE, None)
    if source is not None:
        return placeholder(tensor.shape, Scaled(source, factors, divide), tensor.dtype, tensor.device)
    return (tensor.detach() / factors if divide else tensor.detach() * factors).to(tensor.dtype)


def placeholder(
    shape: Sequence[int], source: Source, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor that stands for one on disk, and is wanted on this device."""
    value = float("nan") if dtype.is_floating_point else 0
    empty = torch.full((), value, dtype=dtype, device=device).expand(tuple(shape))
    setattr(empty, SOURCE, source)
    return empty


def on_disk(tensor: Tensor) -> bool:
    """Is this a placeholder?"""
    return hasattr(tensor, SOURCE)


def values_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or what it stands for, read from disk."""
    source: Source | None = getattr(tensor, SOURCE, None)
    return tensor if source is None else source.read().to(tensor.device)


def from_disk(build: Callable[[], nn.Module], folder: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """A model whose parameters stay in the safetensors files of a folder (one, or shards with their index).

    build: makes the model, `lambda: AutoModelForCausalLM.from_config(config)`; its parameters take no memory meanwhile,
    its buffers are read. Quantizing reads each weight when its turn has come, as float32. device: where they are read
    to. Raises LoadError where model and files do not have the same tensors, in the same shapes, as floats.
    """
    folder = Path(folder)
    with _empty_parameters():
        model = build().eval()
    files = _keys_of(folder)
    known: dict[int, nn.Parameter] = {}  # a shared parameter stays shared
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in files}
    for path, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            name = names.get(id(parameter), f"{path}.{leaf}".removeprefix("."))
            if id(parameter) not in known:
                known[id(parameter)] = _parameter(name, parameter, files, folder, device)
            module._parameters[leaf] = known[id(parameter)]
        for leaf, buffer in list(module._buffers.items()):
            name = f"{path}.{leaf}".removeprefix(".")
            if buffer is not None:
                module._buffers[leaf] = _buffer(name, buffer, files).to(device)
    _expect_all_read(model, files, folder)
    return model


def _expect_all_read(model: nn.Module, files: dict[str, Path], folder: Path) -> None:
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    unread = sorted(set(files) - names)
    if unread:
        raise LoadError(
            f"{len(unread)} tensors of the files have no place in the model: {', '.join(unread[:3])}, …",
            where=str(folder),
            remedy="Build the model with the config that is beside its weights; quantized checkpoints are not read.",
        )


def _buffer(name: str, built: Tensor, files: dict[str, Path]) -> Tensor:
    """As it is in the files, if it is there."""
    if name not in files:
        return built
    with safe_open(files[name], framework="pt") as file:
        return file.get_tensor(name).to(built.dtype).reshape(built.shape)


def _parameter(
    name: str, empty: nn.Parameter, files: dict[str, Path], folder: Path, device: torch.device | str
) -> nn.Parameter:
    if name not in files:
        raise LoadError("the files do not have this parameter", where=f"{folder}: {name}",
                        remedy=did_you_mean(name, files))  # fmt: skip
    with safe_open(files[name], framework="pt") as file:
        part = file.get_slice(name)
        shape, dtype = part.get_shape(), part.get_dtype()
    if dtype not in FLOATS:
        raise LoadError(f"this parameter is stored as {dtype}", where=f"{files[name]}: {name}",
                        remedy="Give a checkpoint in float32, float16 or bfloat16.")  # fmt: skip
    if list(shape) != list(empty.shape):
        raise LoadError(
            f"this parameter is {shape} in the file and {list(empty.shape)} in the model",
            where=f"{files[name]}: {name}",
            remedy="Build the model with the config that is beside its weights.",
        )
    parameter = nn.Parameter(placeholder(shape, InFile(files[name], name), device=device), requires_grad=False)
    setattr(parameter, SOURCE, InFile(files[name], name))
    return parameter


def _keys_of(folder: Path) -> dict[str, Path]:
    """tensor → file."""
    try:
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text())["weight_map"]
            return {key: folder / name for key, name in index.items()}
        found: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
    except (OSError, SafetensorError, ValueError, KeyError) as e:
        raise LoadError(f"the weights cannot be read: {e}", where=str(folder)) from e
    if not found:
        raise LoadError("there are no safetensors files", where=str(folder), remedy="model.save_pretrained(folder).")
    return found


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Parameters of new modules are made on the meta device: without memory, and initialized in no time."""
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:  # a shared one comes again
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    nn.Module.register_parameter = empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
