"""Recipes: a YAML file, overridden by KEY=VALUE settings, checked into a `TrainConfig`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..config import TrainConfig
from ..errors import C2CError


def read_recipe(path: Path, settings: Sequence[str] = ()) -> TrainConfig:
    """A recipe with settings such as `epochs=2` or `fuser.hidden_dim=64` put over it.

    Raises:
        C2CError: an unreadable file, an unknown key (with a suggestion), a value that doesn't fit.
    """
    try:
        recipe = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise C2CError(
            f"no recipe at {path} ({error.strerror}); give the path of a YAML file such as recipes/default.yaml"
        ) from error
    except yaml.YAMLError as error:
        raise C2CError(f"{path} is no valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise C2CError(f"{path} holds {type(recipe).__name__}; expected keys and values of a training run")
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise C2CError(f"{setting!r} is no setting; expected KEY=VALUE, such as epochs=2")
        place = recipe
        *parents, leaf = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise C2CError(f"{parent} of the setting {setting!r} has no keys of its own")
        try:
            place[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise C2CError(f"the value of the setting {setting!r} is no valid YAML; quote it") from error
    try:
        return TrainConfig.model_validate(recipe)
    except ValidationError as error:
        raise C2CError(f"{path}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = _fields(TrainConfig, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return f"unknown key {place}; " + (
            f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
        )
    return f"{place or 'recipe'}: {first['msg']}, given {first['input']!r:.80}"


def _fields(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The keys of the nested model at `path`."""
    for name in path:
        field = model.model_fields.get(str(name))
        if field is None:
            continue  # an index into a list
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), model)
    return list(model.model_fields)
