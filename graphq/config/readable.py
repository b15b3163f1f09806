"""Config models whose complaints name the key at fault and the nearest one that exists."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

from graphq.errors import ConfigError, did_you_mean


class ConfigModel(BaseModel):
    """A pydantic model that raises ConfigError."""

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as e:
            raise readable(e) from e


def readable(error: ValidationError) -> ConfigError:
    """The first complaint of pydantic, with the key it is about and the nearest key or value that exists."""
    first = error.errors()[0]
    keys = [str(k) for k in first["loc"] if not (isinstance(k, str) and ("(" in k or "[" in k or k in ("str", "type")))]
    remedy = "`graphq schema` prints every key."
    if first["type"] == "extra_forbidden" and keys:
        remedy = did_you_mean(keys[-1], {key for model in ConfigModel.__subclasses__() for key in model.model_fields})
    if first["type"] == "literal_error":
        remedy = did_you_mean(
            str(first["input"]), str(first["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        )
    return ConfigError(first["msg"].removeprefix("Value error, "), where=".".join(keys) or None, remedy=remedy)
