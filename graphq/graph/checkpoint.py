"""A model whose parameters stay in the files of its checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from graphq.errors import LoadError, did_you_mean
from graphq.graph.converted import Converted, names_in_model
from graphq.graph.on_disk import SOURCE, InFile, Source, placeholder

FLOATS = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"


def from_disk(build: Callable[[], nn.Module], folder: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """A model whose parameters stay in the safetensors files of a folder (one, or shards with their index).

    build: makes the model, `lambda: AutoModelForCausalLM.from_config(config)`; its parameters take no memory meanwhile,
    its buffers are read. Quantizing reads each weight when its turn has come, as float32; what a transformers model
    makes of several tensors (its experts) is put together then. device: where they are read to. Raises LoadError where
    model and files do not have the same tensors, in the same shapes, as floats.
    """
    folder = Path(folder)
    with _empty_parameters():
        model = build().eval()
    files = _keys_of(folder)
    sources = names_in_model(model, files)
    known: dict[int, nn.Parameter] = {}  # a shared parameter stays shared
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in sources}
    for path, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            name = names.get(id(parameter), f"{path}.{leaf}".removeprefix("."))
            if id(parameter) not in known:
                known[id(parameter)] = _parameter(name, parameter, sources, folder, device)
            module._parameters[leaf] = known[id(parameter)]
        for leaf, buffer in list(module._buffers.items()):
            source = sources.get(f"{path}.{leaf}".removeprefix("."))
            if buffer is not None:
                module._buffers[leaf] = (buffer if source is None else _buffer(buffer, source)).to(device)
    _expect_all_read(model, files, sources, folder)
    return model


def _expect_all_read(model: nn.Module, files: Mapping[str, Path], sources: Mapping[str, Source], folder: Path) -> None:
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)} | {n for n, _ in model.named_buffers()}
    read = {part.key for name in names & set(sources) for part in _parts(sources[name])}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()  # transformers' word for it
    unread = sorted(k for k in set(files) - read if not any(re.search(pattern, k) for pattern in ignored))
    if unread:
        raise LoadError(
            f"{len(unread)} tensors of the files have no place in the model: {', '.join(unread[:3])}, …",
            where=str(folder),
            remedy="Build the model with the config that is beside its weights; quantized checkpoints are not read.",
        )


def _parts(source: Source) -> list[InFile]:
    if isinstance(source, Converted):
        return [part for _, part in source.parts]
    return [source] if isinstance(source, InFile) else []


def _buffer(built: Tensor, source: Source) -> Tensor:
    """As it is in the files."""
    if not isinstance(source, InFile):
        return source.read().to(built.dtype)
    with safe_open(source.path, framework="pt") as file:
        return file.get_tensor(source.key).to(built.dtype).reshape(built.shape)


def _parameter(
    name: str, empty: nn.Parameter, sources: Mapping[str, Source], folder: Path, device: torch.device | str
) -> nn.Parameter:
    if name not in sources:
        raise LoadError("the files do not have this parameter", where=f"{folder}: {name}",
                        remedy=did_you_mean(name, list(sources)))  # fmt: skip
    source = sources[name]
    for part in _parts(source):
        _expect_floats(part, None if isinstance(source, Converted) else list(empty.shape))
    parameter = nn.Parameter(placeholder(empty.shape, source, device=device), requires_grad=False)
    setattr(parameter, SOURCE, source)
    return parameter


def _expect_floats(part: InFile, wanted: list[int] | None) -> None:
    """wanted: the shape that the model has for it."""
    with safe_open(part.path, framework="pt") as file:
        found = file.get_slice(part.key)
        shape, dtype = list(found.get_shape()), found.get_dtype()
    where = f"{part.path}: {part.key}"
    if dtype not in FLOATS:
        raise LoadError(f"this parameter is stored as {dtype}", where=where,
                        remedy="Give a checkpoint in float32, float16 or bfloat16.")  # fmt: skip
    if wanted is not None and shape != wanted:
        raise LoadError(
            f"this parameter is {shape} in the file and {wanted} in the model",
            where=where,
            remedy="Build the model with the config that is beside its weights.",
        )


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
