"""Tensors of a checkpoint that transformers renames, or makes others of, when it loads a model.

Experts are separate tensors in most files, and one tensor in the model. Which become which is transformers' own
knowledge, and so are the operations (`transformers.conversion_mapping`, from version 5 on).
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graphq.errors import LoadError
from graphq.graph.on_disk import InFile, Source


@dataclass(frozen=True)
class Converted:
    """A parameter that a converter of transformers makes of tensors in files. parts: (pattern of the converter that
    the tensor's name fits, tensor)."""

    name: str
    shape: tuple[int, ...]
    converter: Any
    parts: tuple[tuple[str, InFile], ...]
    config: Any  # of the model

    def read(self) -> Tensor:
        converter = copy.deepcopy(self.converter)
        for pattern, part in self.parts:
            converter.add_tensor(self.name, part.key, pattern, part.read())
        try:
            found = converter.convert(self.name, config=self.config).get(self.name)
        except Exception as e:  # of transformers' operations, which raise what they like
            raise LoadError(f"transformers does not convert the files' tensors: {e}", where=self.name,
                            remedy="Load the model into memory: from_pretrained.") from e  # fmt: skip
        value = found[0] if isinstance(found, list) else found
        if not isinstance(value, Tensor) or tuple(value.shape) != self.shape:
            what = "nothing" if value is None else f"{list(value.shape)} instead of {list(self.shape)}"
            raise LoadError(
                f"of the files' tensors transformers makes {what}",
                where=self.name,
                remedy="Build the model with the config that is beside its weights.",
            )
        return value


def names_in_model(model: nn.Module, files: Mapping[str, Path]) -> dict[str, Source]:
    """What is in the files, by the names that the model has for it."""
    plain: dict[str, Source] = {key: InFile(path, key) for key, path in files.items()}
    transforms = _transforms(model)
    if not transforms:
        return plain
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    tensors = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    shapes = {name: tuple(t.shape) for name, t in tensors}
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    config = getattr(model, "config", None)
    found: dict[str, Source] = {}
    parts: dict[str, list[tuple[str, InFile]]] = {}
    for key in sorted(files, key=_in_counting_order):
        name, pattern = rename_source_key(key, renamings, converters)
        unchanged = name not in shapes and key in shapes
        if pattern is None or unchanged:
            found[key if unchanged else name] = plain[key]
            continue
        converter = next(c for c in converters if pattern in c.source_patterns)
        before, _, behind = name.partition(converter.target_patterns[0])
        for target in converter.target_patterns:
            whole = f"{before}{target}{behind}"
            parts.setdefault(whole, []).append((pattern, InFile(files[key], key)))
            found[whole] = Converted(whole, shapes.get(whole, ()), converter, tuple(parts[whole]), config)
    return found


def _transforms(model: nn.Module) -> list[Any]:
    if not any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before version 5 models are as their files
        return []
    return list(get_model_conversion_mapping(model))  # type: ignore[arg-type]


def _in_counting_order(key: str) -> list[str | int]:
    """Expert 10 behind expert 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
