"""Settings from YAML: frozen dataclasses, built key by key; a wrong key is named with its nearest.

``build`` understands nested dataclasses, ``X | None``, ``Literal``, tuples, mappings, ``str``,
``int``, ``float`` and ``bool``. Nothing is guessed: a text where a number belongs is refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from saltire.errors import SaltireError

T = TypeVar("T")

MAX_BYTES = 1 << 20  # a settings file is a page or two; YAML aliases can blow up a larger one


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises SaltireError if it is not there, or not one."""
    path = Path(path)
    if not path.is_file():
        raise SaltireError(f"there is no settings file {path}.")
    if path.stat().st_size > MAX_BYTES:
        raise SaltireError(f"{path} is above {MAX_BYTES >> 20} MiB; it is no settings file.")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SaltireError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise SaltireError(f"{path} holds {type(loaded).__name__}; expected keys with values.")
    return loaded


def read_option(text: str) -> tuple[str, Any]:
    """``name=value`` from a command line; the value is read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise SaltireError(f"--set {text}: expected name=value, such as turns=6.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise SaltireError(f"--set {text}: {value!r} is not a YAML value.") from None


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Make the dataclass ``kind`` from ``values``; ``where`` is the path that errors name."""
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise SaltireError(unknown_key(_join(where, str(key)), str(key), fields))
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise SaltireError(f"{where or 'settings'}: {', '.join(missing)} must be given.")
    return kind(**{k: convert(hints[k], v, _join(where, k)) for k, v in values.items()})


def convert(kind: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``kind``, or a SaltireError that names ``where``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1:
            return convert(inner[0], value, where)
    elif origin is Literal:
        if value in arguments:
            return value
        choices = ", ".join(map(str, arguments))
        raise SaltireError(f"{where} is {value!r}; choose one of: {choices}.")
    elif dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return build(kind, value, where)  # type: ignore[arg-type]
    elif origin is tuple and isinstance(value, (list, tuple)):
        if len(arguments) == 2 and arguments[1] is ...:
            return tuple(convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(arguments) == len(value):
            pairs = zip(arguments, value, strict=True)
            return tuple(convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(pairs))
    elif (origin or kind) in (dict, Mapping) or origin is Mapping:
        if isinstance(value, Mapping):
            return dict(value)
    elif kind is float:
        number = _float(value)
        if number is not None:
            return number
    elif kind in (bool, int, str) and type(value) is kind:
        return value
    raise SaltireError(f"{where} is {value!r}; expected {_name(kind)}.")


def unknown_key(where: str, key: str, known: Iterable[str]) -> str:
    """What to say of a key that does not exist: the nearest that does, or all."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}."
    return f"{where}: there is no such setting; {hint}"


def _float(value: Any) -> float | None:
    """YAML 1.1 reads ``1e-6`` as text, since it has no point; people mean the number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if kind in names:
        return names[kind]
    if dataclasses.is_dataclass(kind) or (get_origin(kind) or kind) in (dict, Mapping):
        return "keys with values"
    if get_origin(kind) is tuple:
        return "a list"
    inner = [_name(a) for a in get_args(kind) if a is not type(None)]
    return " or ".join(inner) if inner else str(kind)
