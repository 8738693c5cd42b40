"""Recipes: a YAML file, overridden by KEY=VALUE settings, checked into the configuration of a run."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..config import COUNTS, TrainConfig
from ..errors import C2CError

Config = TypeVar("Config", bound=BaseModel)


def read_recipe(path: Path, settings: Sequence[str] = ()) -> TrainConfig:
    """A training recipe with settings such as `epochs=2`, `fuser.hidden_dim=64` or `data.0.limit=100` put over it.

    Raises:
        C2CError: an unreadable file, an unknown key (with a suggestion), a value that doesn't fit.
    """
    return checked(TrainConfig, with_settings(read_yaml(path), settings), str(path))


class _Loader(yaml.SafeLoader):
    """YAML's last of two equal keys would win silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in reversed(node.value):
            if isinstance(key, yaml.ScalarNode) and names.count(key.value) > 1 and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} comes twice", key.start_mark)
        return dict(super().construct_mapping(node, deep))


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe, as they are written."""
    try:
        recipe = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise C2CError(
            f"no recipe at {path} ({error.strerror}); give the path of a YAML file such as recipes/default.yaml"
        ) from error
    except yaml.YAMLError as error:
        raise C2CError(f"{path} is no valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict):
        raise C2CError(f"{path} holds {type(recipe).__name__}; expected keys and values of a run")
    return recipe


def with_settings(recipe: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The recipe, changed in place, with KEY=VALUE settings over it."""
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise C2CError(f"{setting!r} is no setting; expected KEY=VALUE, such as epochs=2")
        try:
            _put(recipe, key.split("."), yaml.safe_load(value), setting)
        except yaml.YAMLError as error:
            raise C2CError(f"the value of the setting {setting!r} is no valid YAML; quote it") from error
    return recipe


def checked(model: type[Config], recipe: dict[str, Any], where: str) -> Config:
    """The configuration that a recipe's keys and values give; `where` they come from begins an error."""
    try:
        return model.model_validate(recipe)
    except ValidationError as error:
        raise C2CError(f"{where}: {_explain(error, model)}") from error


def _put(recipe: dict[str, Any], path: Sequence[str], value: Any, setting: str) -> None:
    """Set the value at a path of keys, and of numbers where there is a list: `data.0.limit`."""
    place: Any = recipe
    for depth, name in enumerate(path):
        key: Any = name
        if isinstance(place, list):
            if not (name.isascii() and name.isdigit() and int(name) < len(place)):
                raise C2CError(
                    f"{'.'.join(path[:depth])} has {len(place)} entries, counted from 0; {name!r} of the setting "
                    f"{setting!r} is none of them"
                )
            key = int(name)
        elif not isinstance(place, dict):
            raise C2CError(f"{path[depth - 1]} of the setting {setting!r} has no keys of its own")
        elif depth + 1 < len(path):
            place.setdefault(name, {})
        if depth + 1 == len(path):
            place[key] = value
        else:
            place = place[key]


@dataclass(frozen=True)
class Key:
    """A key of a recipe as it is written there, `N` being the number of a list's entry.

    Attributes:
        name: with the keys above it, as `fuser.hidden_dim`; `[.N]` where one may stand for a list of one.
        type: as in the source of `TrainConfig`.
        default: as in YAML; "" for a key that has to be given.
        description: what it means, with its bounds.
    """

    name: str
    type: str
    default: str
    description: str


def keys(model: type[BaseModel] = TrainConfig, above: str = "") -> Iterator[Key]:
    """Every key of a recipe, those of nested configurations in the place of the key that holds them."""
    types = inspect.get_annotations(model)
    for name, field in model.model_fields.items():
        kind, entry = _nested(field)
        if kind is not None:
            yield from keys(kind, f"{above}{name}{entry}.")
            continue
        bounds = [f"{sign} {getattr(m, k)}" for m in field.metadata for k, sign in _BOUNDS.items() if hasattr(m, k)]
        limits = f" ({', '.join(bounds)})" if bounds else ""
        default = "" if field.is_required() else _as_yaml(field.default)
        yield Key(above + name, str(types[name]), default, (field.description or "") + limits)


_BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def _nested(field: FieldInfo) -> tuple[type[BaseModel] | None, str]:
    """The configuration whose keys a field takes; ".N" where it takes a list of them, "[.N]" where one or a list."""
    entries = field.default if isinstance(field.default, list) else [field.default]
    if not field.is_required() and not all(isinstance(entry, BaseModel) for entry in entries):
        return None, ""  # one that may be left out altogether, which nobody writes
    found = next(_models(field), None)
    lists = get_origin(field.annotation) is list
    return found, ".N" if lists else "[.N]" if field.annotation is not found else ""


def _models(field: FieldInfo) -> Iterator[type[BaseModel]]:
    """The configurations that a field's type names."""
    waiting: list[Any] = [field.annotation]
    while waiting:
        kind = waiting.pop(0)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind
        waiting += get_args(kind)


def _as_yaml(value: Any) -> str:
    if isinstance(value, (list, Path)):
        value = [_plain(v) for v in value] if isinstance(value, list) else _plain(value)
    return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("\n").removesuffix("\n...")


def _plain(value: Any) -> Any:
    return value.as_posix() if isinstance(value, Path) else value


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    errors = error.errors()
    # A misspelt key comes first: what it leaves unset is an error of its own.
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    keys = [key for key in first["loc"] if key not in COUNTS]
    place = ".".join(map(str, keys))
    if first["type"] == "extra_forbidden":
        known = _fields(model, keys[:-1])
        close = difflib.get_close_matches(str(keys[-1]), known, n=1)
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
        model = next(_models(field), model)
    return list(model.model_fields)
