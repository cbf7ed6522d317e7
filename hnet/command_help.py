"""Help texts of commands: fields with type, default and docstring, one level at a time."""

import ast
import dataclasses
import functools
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from hnet import fields
from hnet.dotted import locate
from hnet.fields import is_part, is_section, join
from hnet.parts import Settings

WIDTH = 100


@functools.cache
def docs(cls: type) -> dict[str, str]:
    """Field -> its docstring (the string below it in the source), inherited fields included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" not in base.__dict__:
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        except (OSError, TypeError, SyntaxError):  # a class without source
            continue
        for node, after in zip(body, body[1:]):
            match node, after:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[fields.public(name)] = " ".join(text.split())
    return found


def summary(thing: Any) -> str:
    """First line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def defaults(cls: type) -> dict[str, Any]:
    """JSON content with the default of each field that has a default."""
    content = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            content[fields.public(field.name)] = fields.to_json(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            content[fields.public(field.name)] = fields.to_json(field.default_factory())
    return content


def leaves(cls: type, content: Any, path: str = "") -> Iterator[str]:
    """Dotted paths of all fields of a configuration, including sections and parts."""
    hint = fields.plain(cls)
    if is_part(hint):
        content = content if isinstance(content, dict) else {"name": content}
        hint = fields.part_class(hint, content["name"], path)
    if dataclasses.is_dataclass(hint) and isinstance(content, dict):
        for name, inner in fields.hints(hint).items():
            yield join(path, name)
            yield from leaves(inner, content.get(name), join(path, name))
    elif typing.get_origin(hint) is tuple and isinstance(content, list):
        for i, item in enumerate(content):
            yield from leaves(typing.get_args(hint)[0], item, join(path, i))


def same_name(cls: type, content: Any, path: str) -> str | None:
    """The fields whose last name, or its initials, is that of `path`, if there are one to three.

    Those in the section of `path` come before all others.
    """
    section, _, last = path.rpartition(".")
    names = {known: known.rpartition(".")[2] for known in leaves(cls, content)}
    found = [known for known, name in names.items() if last in (name, fields.initials(name))]
    found = [known for known in found if known.rpartition(".")[0] == section] or found
    return " or ".join(found) if len(found) in (1, 2, 3) else None


# --- texts ----------------------------------------------------------------------------------------

MOST_LINES = 60
"""number of lines of fields that a help without a topic shows"""


def of_options(cls: type, content: dict[str, Any], topic: str = "") -> str:
    """Help of a program whose options are one dataclass: what it does, then every field, or only
    the sections if all fields are too many; or the field `topic`."""
    if topic:
        return of_topic(cls, content, topic)
    listed = level(cls, content, deep=True)
    if len(listed.splitlines()) > MOST_LINES:
        listed = level(cls, content)
    return f"{inspect.getdoc(sys.modules[cls.__module__])}\n\n{listed}"


def of_topic(cls: type, content: Any, path: str) -> str:
    """Help of a dotted field: its inner fields, the parts that it accepts, or the field itself."""
    parent, key, hint = locate(cls, content, path)
    value = parent[key] if isinstance(parent, list) else parent.get(key)
    inner = fields.plain(hint)
    if is_section(inner):
        return f"{inspect.getdoc(inner)}\n\n{level(inner, value, path)}"
    is_tuple = typing.get_origin(inner) is tuple
    kind = typing.get_args(inner)[0] if is_tuple else inner
    if is_section(kind):
        levels = [level(kind, item, join(path, i)) for i, item in enumerate(value)]
        return "\n\n".join([inspect.getdoc(kind), *levels])
    shown = field_text(path, hint, value, _doc(cls, content, path))
    if is_part(kind):
        shown += "\n\n" + parts(kind, f"{path}.0" if is_tuple else path)
    return shown


def _doc(cls: type, content: Any, path: str) -> str:
    """Docstring of the field at a dotted path."""
    outer, _, name = path.rpartition(".")
    if outer:
        parent, key, hint = locate(cls, content, outer)
        cls, content = fields.plain(hint), parent[key]
        if is_part(cls):
            cls = fields.part_class(cls, content["name"], outer)
    return docs(cls).get(name, "") if is_section(cls) or is_part(cls) else ""


def parts(kind: type[Settings], path: str) -> str:
    """The parts of a table, each with its fields."""
    texts = []
    for name in kind.table.names:
        own = fields.part_class(kind, name, path)
        texts += [table([(name, summary(own.part))]), level(own, defaults(own), path)]
    texts.append(f"  or package.module:Class, {kind.table.a_kind} of your own")
    return "\n".join(filter(None, texts))


def level(cls: type, content: Any, path: str = "", *, deep: bool = False) -> str:
    """The fields below a dotted path: --field TYPE = default, and the docstring.

    Inner sections come last, as a list with the command that shows them. deep: their fields are
    shown instead.
    """
    lines, sections = [], []
    for name, hint in fields.hints(cls).items():
        where, inner = join(path, name), fields.plain(hint)
        value = content.get(name, dataclasses.MISSING)
        if is_section(inner) and deep:
            lines.append(level(inner, value, where, deep=True))
        elif is_section(inner):
            sections.append((where, summary(inner)))
        elif typing.get_origin(inner) is tuple and is_section(typing.get_args(inner)[0]):
            text = summary(typing.get_args(inner)[0])
            sections += [(f"{where}.{i}", text) for i in range(len(value))]
        else:
            lines.append(field_text(where, hint, value, docs(cls).get(name, "")))
            if fields.holds_parts(inner):
                lines.append(f"        --help {where} lists them")
    if sections:
        lines.append(
            f"{bool(lines) * chr(10)}Sections (--help {sections[0][0]} lists the fields of one):"
        )
        lines.append(table(sections))
    return "\n".join(lines)


def field_text(path: str, hint: Any, value: Any, text: str) -> str:
    """--field TYPE = value, and its docstring below."""
    is_given = value is not dataclasses.MISSING
    tail = f"= {value_text(value)}" if is_given else "(must be given)"
    head = f"  --{path} {fields.type_text(hint)} {tail}"
    below = textwrap.fill(text, WIDTH, initial_indent=_BELOW, subsequent_indent=_BELOW)
    return f"{head}\n{below}" if text else head


_BELOW = 8 * " "


def value_text(value: Any) -> str:
    """A value in the form of the command line."""
    if isinstance(value, dict):
        inner = [f"{k}={value_text(v)}" for k, v in value.items() if k != "name"]
        return value["name"] + (f"({', '.join(inner)})" if inner else "")
    if isinstance(value, list):
        words = ["+".join(v) if isinstance(v, list) else value_text(v) for v in value]
        return " ".join(words) or "()"
    return '""' if value == "" else str(value)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and their descriptions, in two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(
        textwrap.fill(
            text, WIDTH, initial_indent=f"  {name:<{width}}  ", subsequent_indent=(width + 4) * " "
        )
        for name, text in rows
    )
