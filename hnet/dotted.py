"""Dotted fields of a configuration, such as ``train.steps``: find, set and compare them."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from hnet.fields import (
    FieldError,
    from_json,
    hints,
    is_part,
    join,
    part_class,
    plain,
    to_json,
    unknown,
)


def locate(cls: type, content: Any, path: str) -> tuple[Any, str | int, Any]:
    """Location of a dotted field in the JSON content of a `cls`: (object or list, key, type).

    Raises FieldError, which names the known fields, if the field does not exist.
    """
    hint, node, name = cls, content, ""
    parent: Any = None
    key: Any = ""
    for step in path.split("."):
        parent, hint = node, plain(hint)
        if typing.get_origin(hint) is tuple and isinstance(node, list):
            kinds = typing.get_args(hint)
            kinds = kinds[:1] * len(node) if kinds[-1] is Ellipsis else kinds
            inner = {str(i): kind for i, kind in enumerate(kinds)}
        elif is_part(hint) and isinstance(node, dict):
            part: Any = part_class(hint, node["name"], name)
            inner = hints(part)
        elif dataclasses.is_dataclass(hint) and isinstance(node, dict):
            inner = hints(hint)
        else:
            inner = {}
        if step not in inner:
            remedy = unknown(step, list(inner), name)
            raise FieldError(f"unknown field {join(name, step)}: {remedy}")
        key = int(step) if isinstance(node, list) else step
        hint, name = inner[step], join(name, step)
        node = parent[key] if isinstance(parent, list) else parent.get(key)
        if isinstance(node, str) and is_part(plain(hint)):
            node = parent[key] = {"name": node}
    return parent, key, hint


def put(cls: type, content: Any, values: Mapping[str, Any]) -> None:
    """Set dotted fields of JSON content, outer fields first.

    Setting a part replaces it: its fields have the new part's defaults.
    """
    for path in sorted(values, key=lambda path: path.count(".")):
        parent, key, _ = locate(cls, content, path)
        parent[key] = values[path]


def with_fields(config: Any, values: Mapping[str, Any]) -> Any:
    """The configuration with new values (JSON content) for some dotted fields.

    Raises ConfigError, which names the field, for an unknown field or an invalid value.
    """
    content = to_json(config)
    put(type(config), content, values)
    return from_json(type(config), content)


def flatten(changes: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested changes as dotted fields: ``{"train": {"steps": 5}}`` is ``{"train.steps": 5}``.

    An object with a name replaces a part; an object without a name changes fields of the current
    part.
    """
    found: dict[str, Any] = {}
    for name, value in changes.items():
        where = join(path, name)
        if isinstance(value, dict) and "name" not in value:
            found |= flatten(value, where)
        else:
            found[where] = value
    return found


def differences(a: Any, b: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted field, value in a, value in b) for each difference of two JSON contents."""
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict) and a.get("name") == b.get("name"):
        for key in [*a, *(k for k in b if k not in a)]:
            yield from differences(a.get(key), b.get(key), join(path, key))
    elif a != b:
        yield path, a, b
