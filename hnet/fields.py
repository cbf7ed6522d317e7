"""Configurations as JSON content and as dotted fields.

A configuration is a tree of frozen dataclasses. In JSON a dataclass is an object, a tuple is a list
and a part (`hnet.parts`) is an object with its name: ``{"name": "mlp", "width": 512}``. A name as a
string is the part with its defaults; ``"package.module:Class"`` is a class outside of the tables.

Every error is a ConfigError with a one-line message that names the dotted field, the value and a
remedy.
"""

import dataclasses
import difflib
import errno
import functools
import json
import math
import os
import reprlib
import stat
import threading
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hnet.errors import ConfigError, first_line
from hnet.parts import Settings

_MOST = 2**53  # integers up to this are exact in every JSON reader
_MOST_32 = 2**31 - 1
_PIPE_SECONDS = 5.0
_MOST_FLOAT = 3.4e38  # larger numbers are infinite in float32


class FieldError(ConfigError):
    """A field that does not exist, or a value of the wrong type."""


@dataclass(frozen=True)
class Bounds:
    """Range of the finite numbers that a field accepts: `Annotated[int, Bounds(1)]`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def hold(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        low = f"above {self.above:g}" if self.above > -math.inf else f"{self.least:g}"
        if self.below < math.inf:
            return f"{low} to below {self.below:g}"
        if self.most < _MOST_32:
            return f"{low} to {self.most:g}"
        return low if self.above > -math.inf else f"{low} or more"

    def remedy(self, value: float) -> str:
        return f"use at most {self.most}" if value > self.most else f"use {self}"


Count = Annotated[int, Bounds(1, _MOST_32)]
"""An integer of at least 1 that fits into 32 bits."""
Natural = Annotated[int, Bounds(0, _MOST_32)]
"""An integer of at least 0 that fits into 32 bits."""
Rows = Annotated[int, Bounds(1, 65536)]
"""Number of rows that run together."""
Share = Annotated[float, Bounds(0, 1)]
Positive = Annotated[float, Bounds(above=0, most=1e12)]
NotNegative = Annotated[float, Bounds(0, 1e12)]
Seconds = Annotated[float, Bounds(0, 1e9)]
"""Seconds that a thread can wait."""


def shown(value: Any) -> str:
    """`repr`, shortened to fit into a line for a value of any size or depth."""
    return _SHORT.repr(value)


def told(value: Any) -> str:
    """`shown`; for a list of objects, such as stages, their number."""
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        return f"({len(value)} of them)"
    return shown(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 80, 80, 40
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = 6


def join(path: str, name: str | int) -> str:
    return f"{path}.{name}" if path else str(name)


def unknown(name: str, known: Sequence[str], path: str = "") -> str:
    """Remedy for a name that is not among `known`, the fields of `path`."""
    if near := difflib.get_close_matches(name, known, 1):
        return f"did you mean {join(path, near[0])}?"
    return f"known are {', '.join(known)}" if known else f"{path or 'it'} has no fields"


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
        kind = type_text(args[0])
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


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for text from outside: every fault is a ValueError, also deep nesting."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def without_nan(value: Any) -> Any:
    """JSON content with NaN and infinity replaced by None, since JSON has neither."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: without_nan(v) for name, v in value.items()}
        case list() | tuple():
            return [without_nan(v) for v in value]
        case _:
            return value


def json_text(content: Any, **options: Any) -> str:
    """`json.dumps` for results: text that every JSON reader accepts (`without_nan`)."""
    try:
        return json.dumps(content, allow_nan=False, **options)
    except ValueError:
        return json.dumps(without_nan(content), allow_nan=False, **options)


def read_bytes(path: str | os.PathLike) -> bytes:
    """Content of a file or pipe, also of one in a bucket. Raises OSError also for what cannot be a
    path, for a device, which may have no end, and for a pipe that nothing writes to."""
    if "://" in os.fspath(path):
        from etils import epath

        try:
            return epath.Path(path).read_bytes()
        except OSError:
            raise
        except Exception as e:  # each file system raises its own type
            raise OSError(errno.EINVAL, f"it cannot be opened ({first_line(e)})") from None
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        raise OSError(errno.EINVAL, "it cannot be a path") from None
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, "it is a device: give a file")
    if stat.S_ISFIFO(mode):
        return _read_pipe(path)
    return Path(path).read_bytes()


def _read_pipe(path: str | os.PathLike) -> bytes:
    """Content of a pipe, once something has opened it for writing. Raises OSError if nothing does
    within `_PIPE_SECONDS`."""
    opened: list[int] = []
    thread = threading.Thread(target=lambda: opened.append(os.open(path, os.O_RDONLY)), daemon=True)
    thread.start()
    thread.join(_PIPE_SECONDS)
    if not (has_writer := bool(opened)):
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # ends the thread's `open`
        thread.join()
    with open(opened[0], "rb") as file:
        if not has_writer:
            raise OSError(errno.EINVAL, "it is a pipe that nothing writes to")
        return file.read()


def read_json(path: str | os.PathLike, what: str = "file") -> Any:
    """Content of a JSON file. Raises a one-line ConfigError that calls the file `what`."""
    try:
        return parse_json(read_bytes(path))
    except OSError as e:
        raise ConfigError(f"{what} {os.fspath(path)!r}: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"{what} {os.fspath(path)!r} is not JSON: {e}") from None


def read_object(path: str | os.PathLike, what: str, **kinds: Any) -> dict[str, Any]:
    """Content of a JSON file that a command wrote: an object with values of these types, by name.

    Raises ConfigError, which calls the file `what`, for other content.
    """
    content = read_json(path, what)
    where = f"{what} {os.fspath(path)!r}"
    if not isinstance(content, dict):
        raise ConfigError(f"{where} holds no object: restore or remove it")
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise ConfigError(
                f"{where}: {name}={shown(content.get(name))} was not written there: restore or "
                "remove the file"
            )
    return content


def from_json(hint: Any, content: Any, path: str = "") -> Any:
    """The value of type `hint`, usually a dataclass, from JSON content.

    A missing field gets its default. Raises ConfigError for an unknown field, a missing field
    without default, a value of the wrong type, a number out of bounds, and errors of the dataclass.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = from_json(args[0], content, path)
        _check_number(value, args[1:], path)
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
        _check_number(content, (), path)
        return float(content)
    elif hint is type(None) and content is None or hint in (str, bool) and type(content) is hint:
        return content
    elif hint is int and type(content) is int:
        _check_number(content, (), path)
        return content
    raise FieldError(f"{path}={shown(content)}: expected {type_text(hint)}")


def _check_number(value: Any, bounds: Sequence[Any], path: str) -> None:
    """Raise ConfigError for a number that is not finite, too large for JSON, or out of bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if abs(value) > _MOST and isinstance(value, int):
        raise ConfigError(f"{path}={shown(value)}: use at most 2**53")
    if not math.isfinite(value):
        raise ConfigError(f"{path}={value}: use a finite number")
    if abs(value) > _MOST_FLOAT:
        raise ConfigError(f"{path}={value}: use at most {_MOST_FLOAT}")
    for bound in bounds:
        if isinstance(bound, Bounds) and not bound.hold(value):
            raise ConfigError(f"{path}={value}: {bound.remedy(value)}")


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
        _check_number(value, _bounds(hint), path)


def _bounds(hint: Any) -> list[Bounds]:
    """All `Bounds` of a type, including those of its options."""
    inner = [bounds for option in typing.get_args(hint) for bounds in _bounds(option)]
    return [hint] if isinstance(hint, Bounds) else inner


# --- dotted fields --------------------------------------------------------------------------------


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
