"""QuantConfig: an ordered list of rules; the last match wins, ignore beats all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, field_serializer, field_validator, model_validator

from graphq.config.readable import ConfigModel
from graphq.config.scheme import Scheme
from graphq.config.selectors import Layer, Selector, describe, matches, vocabulary
from graphq.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Resolution:
    """The scheme of one layer and the words that say which rule gave it."""

    scheme: Scheme | None
    because: str


Part = Literal["weight", "input", "output", "bias"]


class Rule(ConfigModel):
    """The layers that `select` chooses are quantized by `scheme`, or left float where it is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    select: Selector = Field(description="Module path, 're:…', glob, class, op, or callable (see selectors).")
    scheme: Scheme | None = Field(None, description="A Scheme, the name of one, or None for float.")
    only: tuple[Part, ...] | None = Field(
        None, description="The tensors it decides on: weight, input, output; earlier rules keep the others. None: all."
    )
    reason: str = Field("", description="Why; `explain` prints it.")
    optional: bool = Field(False, description="Matching nothing in a model is fine (for rules in presets).")

    @field_validator("scheme", mode="before")
    @classmethod
    def _named_scheme(cls, value: Any) -> Any:
        if isinstance(value, str):
            from graphq.config.presets import SCHEMES

            if value not in SCHEMES:
                raise ValueError(f"unknown scheme {value!r}. {did_you_mean(value, SCHEMES)}")
            return SCHEMES[value]
        return value

    @field_serializer("select")
    def _select_as_text(self, select: Selector) -> str:
        if isinstance(select, type):
            return f"{select.__module__}.{select.__qualname__}"
        if not isinstance(select, str):
            raise ConfigError(
                "a callable selector cannot be written to a file",
                where=f"rule {describe(select)}",
                remedy="Use a module path, regular expression, glob, class or op.",
            )
        return select

    def upon(self, earlier: Resolution, because: str) -> Resolution:
        """What holds for a layer for which earlier rules said `earlier`."""
        if self.only is None:
            return Resolution(self.scheme, because)
        parts: dict[str, Any] = {p: getattr(self.scheme, p) if self.scheme else None for p in self.only}
        scheme = (earlier.scheme or Scheme()).model_copy(update=parts)
        changed = f"{because} for {' and '.join(self.only)}"
        return Resolution(
            None if scheme == Scheme() else scheme, f"{earlier.because}; {changed}" if earlier.scheme else changed
        )


class Algorithm(ConfigModel):
    """One algorithm that changes weights before ranges are observed, with its arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="A registered algorithm.")
    args: dict[str, Any] = Field(default_factory=dict, description="Arguments of the algorithm.")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class QuantConfig(ConfigModel):
    """Ordered rules and an ignore list, the same for every model."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str = Field("custom", description="Shown in reports and written to the model's metadata.")
    rules: tuple[Rule, ...] = Field(description="In order; the last rule that matches a layer wins.")
    ignore: tuple[Selector, ...] = Field((), description="Selectors of layers that stay float whatever the rules say.")
    algorithms: tuple[Algorithm, ...] = Field((), description="In order; a name stands for one with its defaults.")
    bias_correction: bool = Field(
        False,
        description="Take what rounded weights add to a layer's mean output off its bias (static schemes; not where an "
        "algorithm has made the weight good for what its inputs have lost: QEP, GPTAQ, AutoRound).",
    )

    @field_serializer("ignore")
    def _ignore_as_text(self, ignore: tuple[Selector, ...]) -> list[str]:
        return [Rule(select=s).model_dump()["select"] for s in ignore]

    def resolve(self, layer: Layer) -> Resolution:
        """Which rule decides on this layer."""
        for selector in self.ignore:
            if matches(selector, layer):
                return Resolution(None, f"ignored by {describe(selector)}")
        found = Resolution(None, "no rule selects it")
        for number, rule in enumerate(self.rules, 1):
            if matches(rule.select, layer):
                why = f" ({rule.reason})" if rule.reason else ""
                found = rule.upon(found, f"rule {number}: {describe(rule.select)}{why}")
        return found

    def check(self, layers: list[Layer]) -> None:
        """Raises ConfigError for a selector that chooses nothing in this model."""
        named = [(f"rules[{i}].select", r.select) for i, r in enumerate(self.rules) if not r.optional]
        named += [(f"ignore[{i}]", s) for i, s in enumerate(self.ignore)]
        for key, selector in named:
            if not any(matches(selector, layer) for layer in layers):
                plain = selector.removeprefix("re:").strip("*.") if isinstance(selector, str) else describe(selector)
                raise ConfigError(
                    f"the selector {describe(selector)} matches nothing in this model",
                    where=f"config {self.name!r}, {key}",
                    remedy=did_you_mean(plain, vocabulary(layers)),
                )

    def with_rules(self, *rules: Rule, ignore: tuple[Selector, ...] = ()) -> QuantConfig:
        """This config with more rules after its own (they win), and more to ignore."""
        more = {"name": f"{self.name}+", "rules": (*self.rules, *rules), "ignore": (*self.ignore, *ignore)}
        return self.model_copy(update=more)

    def to_yaml(self) -> str:
        return yaml.safe_dump(json.loads(self.model_dump_json(exclude_defaults=True)), sort_keys=False)

    @classmethod
    def from_text(cls, text: str, *, where: str = "config") -> QuantConfig:
        """Parse YAML or JSON (which is YAML). Raises ConfigError that names the key at fault."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise ConfigError(f"not valid YAML or JSON: {e}", where=where, remedy="Mend the syntax.") from e
        if not isinstance(data, dict):
            raise ConfigError("a config file holds a mapping with 'rules'", where=where, remedy="See `graphq schema`.")
        try:
            return cls(**data)
        except ConfigError as e:
            raise ConfigError(e.what, where=f"{where}, {e.where}" if e.where else where, remedy=e.remedy) from e

    @classmethod
    def load(cls, source: str | Path | QuantConfig) -> QuantConfig:
        """A config as it is, the preset of that name, or the YAML or JSON file at that path."""
        from graphq.config.presets import CONFIGS

        if isinstance(source, QuantConfig):
            return source
        if not isinstance(source, (str, Path)):
            raise ConfigError(
                f"a config is a QuantConfig, a preset's name or a file, not a {type(source).__name__}",
                remedy="QuantConfig(**mapping) makes one of a mapping.",
            )
        if str(source) in CONFIGS:
            return CONFIGS[str(source)]
        from graphq.config.known import WITH_ALGORITHM

        if str(source) in WITH_ALGORITHM:
            preset, algorithm = WITH_ALGORITHM[str(source)]
            raise ConfigError(
                f"{source} is a format with the weight algorithm {algorithm}, which is not there yet",
                remedy=f"Its format alone is the preset {preset!r}.",
            )
        path = Path(source)
        if path.suffix in (".yaml", ".yml", ".json"):
            if not path.exists():
                raise ConfigError(f"no such config file: {path}", remedy="Check the path.")
            return cls.from_text(path.read_text(), where=str(path))
        raise ConfigError(
            f"unknown preset {str(source)!r}",
            remedy=did_you_mean(str(source), CONFIGS) + " Or give the path of a .yaml or .json file.",
        )

    @staticmethod
    def from_config_groups(
        groups: Any, ignore: Sequence[str] = (), *, kv_cache_scheme: Any = None, name: str = "config_groups"
    ) -> QuantConfig:
        """llm-compressor's config_groups: see `graphq.config.imports.config_groups`."""
        from graphq.config.imports.config_groups import from_config_groups

        return from_config_groups(groups, ignore, kv_cache_scheme=kv_cache_scheme, name=name)

    @staticmethod
    def from_modelopt(config: Any, *, name: str = "modelopt") -> QuantConfig:
        """A ModelOpt config, list or dict: see `graphq.config.imports.modelopt`."""
        from graphq.config.imports.modelopt import from_modelopt

        return from_modelopt(config, name=name)

    @staticmethod
    def from_quark(config: Any, *, name: str = "quark") -> QuantConfig:
        """The dict form of AMD Quark's QConfig: see `graphq.config.imports.quark`."""
        from graphq.config.imports.quark import from_quark

        return from_quark(config, name=name)

    @staticmethod
    def from_onecomp(**filters: Any) -> QuantConfig:
        """OneComp's six filters and num_layers: see `graphq.config.imports.onecomp`."""
        from graphq.config.imports.onecomp import from_onecomp

        return from_onecomp(**filters)

    @staticmethod
    def from_tico(config: Any, *, name: str = "tico") -> QuantConfig:
        """TICO's PTQConfig as a mapping: see `graphq.config.imports.tico`."""
        from graphq.config.imports.tico import from_tico

        return from_tico(config, name=name)
