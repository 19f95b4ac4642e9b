"""Trees of values for config dataclasses: laying one over another, comparing, showing, and building them strictly.

A tree is nested mappings, as TOML and JSON give them. Knows little of what the values mean.
"""

import dataclasses
import difflib
import math
import numbers
import os
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeGuard

from fastres.errors import InputError

NO_COUNTS = ("seed", "cudnn")  # whole numbers that are not grouped by thousands: they count nothing


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, mappings merged key by key."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def leaves(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The values of a tree by their whole path: "recipe.lr"."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return found


def changed_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The keys in which two trees differ, as lines "recipe.lr: 0.1 -> 0.2"."""
    a, b = leaves(ours), leaves(theirs)
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def show_key(path: str) -> str:
    """The key at the end of a path as people write it: "weight decay on" for "recipe.weight_decay_on"."""
    return path.rpartition(".")[2].replace("_", " ")


def show_value(path: str, value: Any) -> str:
    """The value at a path as people write it: 64,000, "on", "auto" where nothing was chosen."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, int) and path not in NO_COUNTS:
        return f"{value:,}"
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return "auto" if value is None else str(value)


def is_int(value: Any) -> bool:
    """Whether it is an integer, and not true or false."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value out of a JSON file is a finite number (NaN and Inf are stored as text)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" for an error's message; empty where nothing known is like the word."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.65)
    return f"; did you mean {close[0]!r}?" if close else ""


def build(cls: type, tree: Mapping[str, Any], path: str = "") -> Any:
    """An instance of a config dataclass from a mapping, every key known and every value of its type.

    Args:
        cls: A dataclass whose fields are dataclasses, scalars, optional scalars, `Literal`s or tuples of one type.
        tree: Its values; keys left out take their defaults.
        path: What messages put before a key: "recipe.".

    Raises:
        InputError: An unknown key (with the nearest known one), a value of the wrong type or not among the options.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            homes = [home for home, kind in hints.items() if key in getattr(kind, "__dataclass_fields__", ())]
            place = f"; it is one of {homes[0]}'s: {path}{homes[0]}.{key}" if homes else ""
            raise InputError(
                f"unknown key {path}{key}{place or nearest(str(key), hints) or '; keys: ' + ', '.join(hints)}"
            )
        values[key] = _coerce(hints[key], value, f"{path}{key}")
    return cls(**values)


def coerced(instance: Any) -> dict[str, Any]:
    """The values of a config dataclass by name, each as its declared type; errors as of `build`."""
    hints = typing.get_type_hints(type(instance))
    return {key: _coerce(hints[key], getattr(instance, key), key) for key in hints}


def _coerce(kind: Any, value: Any, path: str) -> Any:
    """The value as its declared type, or InputError. Takes what TOML and JSON write for it, numpy's numbers, paths."""
    if hasattr(value, "tolist"):  # of numpy and torch: a number or a list
        value = value.tolist()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return build(kind, value, f"{path}.")
        raise InputError(f"{path} is {value!r}; it must be a table of keys")
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _coerce(next(option for option in options if option is not type(None)), value, path)
    if origin is Literal:
        if value in options:
            return value
        raise InputError(f"{path} is {value!r}; it must be one of {', '.join(options)}{nearest(str(value), options)}")
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(options[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if kind is float and is_int(value) and abs(value) < 1 << 1000:
        return float(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind is str and is_int(value):
        return str(value)
    if isinstance(kind, type) and isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    many = {int: "integers", str: "text"}.get(options[0], "values") if options else ""
    wanted = {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(kind, f"a list of {many}")
    raise InputError(f"{path} is {value!r}; it must be {wanted}")
