"""Configurations as JSON content: the types of their fields, reading, writing and checking.

A configuration is a tree of frozen dataclasses. In JSON a dataclass is an object, a tuple is a list
and a part (`hnet.parts`) is an object with its name: ``{"name": "mlp", "width": 512}``. A name as a
string is the part with its defaults; ``"package.module:Class"`` is a class outside of the tables.

Every error is a ConfigError with a one-line message that names the dotted field, the value and a
remedy.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from hnet.bounds import Bounds, NamesFile, check_marks, check_number, names_file
from hnet.errors import ConfigError, shown
from hnet.parts import Settings


class FieldError(ConfigError):
    """A field that does not exist, or a value of the wrong type."""


def join(path: str, name: str | int) -> str:
    return f"{path}.{name}" if path else str(name)


def unknown(name: str, known: Sequence[str], path: str = "") -> str:
    """Remedy for a name that is not among `known`, the fields of `path`."""
    near = difflib.get_close_matches(name, known, 1)
    if near := near or [field for field in known if initials(field) == name]:
        return f"did you mean {join(path, near[0])}?"
    return f"known are {', '.join(known)}" if known else f"{path or 'it'} has no fields"


def initials(name: str) -> str:
    """``lr`` for ``learning_rate``; a name of one word has none and stays."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else name


def public(name: str) -> str:
    """Name of a dataclass field in JSON and on the command line: `from` for `from_`.

    `from` is a word of Python and cannot name a field.
    """
    return name.removesuffix("_")


@functools.cache
def attributes(cls: type) -> dict[str, str]:
    """Public name -> attribute of each field of a dataclass."""
    return {public(field.name): field.name for field in dataclasses.fields(cls)}


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """Name -> type of each field of a dataclass, with `Annotated` bounds."""
    types_of = typing.get_type_hints(cls, include_extras=True)
    return {name: types_of[attribute] for name, attribute in attributes(cls).items()}


def is_part(hint: Any) -> bool:
    """Whether a field of this type holds one part of a table."""
    return isinstance(hint, type) and issubclass(hint, Settings)


def unwrap(hint: Any) -> Any:
    """The type without `Annotated`."""
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return hint


def options(hint: Any) -> tuple[Any, ...]:
    """The types of a union; () if the type is not a union."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else ()


def plain(hint: Any) -> Any:
    """The type without `Annotated`, and X for `X | None`."""
    hint = unwrap(hint)
    kinds = [unwrap(option) for option in options(hint) if option is not type(None)]
    return kinds[0] if len(kinds) == 1 else hint


def holds_parts(hint: Any) -> bool:
    """Whether a field of this type holds a part, or a tuple of parts."""
    is_tuple = typing.get_origin(hint) is tuple
    return is_part(typing.get_args(hint)[0] if is_tuple else hint)


def is_section(hint: Any) -> bool:
    """Whether a field of this type is a dataclass that is not a part."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and not is_part(hint)


def type_text(hint: Any) -> str:
    """Description of the values of a type, for errors and help."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = next((a for a in args[1:] if isinstance(a, Bounds)), None)
        kind = "path" if names_file(args[1:]) else type_text(args[0])
        return f"{kind} ({bounds})" if bounds else kind
    if options(hint):
        return " or ".join(type_text(option) for option in args)
    if origin is Literal:
        return "|".join(map(str, args))
    if origin is tuple:
        return f"({', '.join('...' if a is Ellipsis else type_text(a) for a in args)})"
    if is_part(hint):
        return hint.table.kind
    names = {int: "int", float: "float", str: "text", bool: "True|False", type(None): "None"}
    return names.get(hint) or str(getattr(hint, "__name__", hint))


# --- JSON -----------------------------------------------------------------------------------------


def to_json(value: Any) -> Any:
    """A configuration, or a value in one, as JSON content."""
    if dataclasses.is_dataclass(value):
        cls: Any = type(value)
        content = {n: to_json(getattr(value, own)) for n, own in attributes(cls).items()}
        return {"name": value.name, **content} if isinstance(value, Settings) else content
    return [to_json(v) for v in value] if isinstance(value, tuple | list) else value


def from_json(hint: Any, content: Any, path: str = "") -> Any:
    """The value of type `hint`, usually a dataclass, from JSON content.

    A missing field gets its default. Raises ConfigError for an unknown field, a missing field
    without default, a value of the wrong type, a number out of bounds, and errors of the dataclass.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = from_json(args[0], content, path)
        check_marks(value, args[1:], path)
        return value
    if is_part(hint):
        return _part(hint, content, path)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _object(hint, content, path)
    if options(hint):
        for option in args:
            try:
                return from_json(option, content, path)
            except FieldError:
                continue
    elif origin is Literal:
        if any(content == option and type(content) is type(option) for option in args):
            return content
        near = difflib.get_close_matches(str(content), [str(a) for a in args], 1)
        hint_text = f": did you mean {near[0]}?" if near else ""
        known = ", ".join(map(str, args))
        raise FieldError(f"{path}={shown(content)}: use one of {known}{hint_text}")
    elif origin is tuple and isinstance(content, list | tuple):
        kinds = [args[0]] * len(content) if args[-1] is Ellipsis else args
        if len(kinds) == len(content):
            pairs = enumerate(zip(kinds, content))
            return tuple(from_json(kind, v, join(path, i)) for i, (kind, v) in pairs)
    elif hint is float and type(content) in (int, float):
        check_number(content, (), path)
        return float(content)
    elif hint is type(None) and content is None or hint in (str, bool) and type(content) is hint:
        return content
    elif hint is int and type(content) is int:
        check_number(content, (), path)
        return content
    raise FieldError(f"{path}={shown(content)}: expected {type_text(hint)}")


def _object(cls: type, content: Any, path: str) -> Any:
    if not isinstance(content, dict):
        raise FieldError(f"{path or 'configuration'}={shown(content)}: expected an object")
    types_of = hints(cls)
    for name in content:
        if name not in types_of:
            where = join(path, name)
            raise FieldError(f"unknown field {where}: {unknown(str(name), list(types_of), path)}")
    values = {name: from_json(types_of[name], v, join(path, name)) for name, v in content.items()}
    for field in dataclasses.fields(cls):
        if public(field.name) not in values and not has_default(field):
            raise FieldError(f"{join(path, public(field.name))} is missing: give it")
    return cls(**{attributes(cls)[name]: value for name, value in values.items()})


def has_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _part(kind: type[Settings], content: Any, path: str) -> Any:
    """The settings of a part from its name, or from an object with its name."""
    if isinstance(content, str):
        content = {"name": content}
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        names = ", ".join(kind.table.names)
        raise FieldError(f"{path}={shown(content)}: expected {kind.table.a_kind} ({names})")
    return _object(
        part_class(kind, content["name"], path),
        {name: value for name, value in content.items() if name != "name"},
        path,
    )


def part_class(kind: type[Settings], name: str, path: str) -> type[Settings]:
    """The settings class of the part with this name."""
    try:
        return kind.table.find(name).Config
    except ConfigError as e:
        raise FieldError(f"{path}: {e}") from None


def check(config: Any, path: str = "") -> None:
    """Raise ConfigError for a number in a configuration that is out of its field's bounds.

    This is for configurations made in Python; `from_json` does the same checks while reading.
    """
    _check_value(type(config), config, path)


def _check_value(hint: Any, value: Any, path: str) -> None:
    if dataclasses.is_dataclass(value):
        cls: Any = type(value)
        for name, field_hint in hints(cls).items():
            _check_value(field_hint, getattr(value, attributes(cls)[name]), join(path, name))
    elif isinstance(value, tuple):
        options = (plain(hint), *typing.get_args(plain(hint)))
        kinds = next((typing.get_args(o) for o in options if typing.get_origin(o) is tuple), ())
        for i, item in enumerate(value):
            kind = kinds[min(i, len(kinds) - 1)] if kinds else None
            _check_value(kinds[0] if kind is Ellipsis else kind, item, join(path, i))
    else:
        check_marks(value, marks(hint), path)


@functools.cache
def marks(hint: Any) -> tuple[Bounds | NamesFile, ...]:
    """All marks of a type, including those of its options."""
    inner = (mark for option in typing.get_args(hint) for mark in marks(option))
    return (hint,) if isinstance(hint, Bounds | NamesFile) else tuple(inner)
