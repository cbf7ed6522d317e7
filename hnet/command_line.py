"""One command line for all programs: `[--section.field VALUE ...]`, and errors in one line.

Arguments are read before large packages are imported, so this module does not need JAX.
"""

import argparse
import contextlib
import errno
import gc
import math
import os
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from hnet import command_help, fields
from hnet.bounds import NamesFile
from hnet.dotted import locate
from hnet.errors import ConfigError, Failed, shown
from hnet.fields import FieldError
from hnet.files import parse_json
from hnet.printable import printable
from hnet.runtime.cpu import keep_freed_memory, use_huge_pages

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
_LINE = 900
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
OUTPUT_CLOSED = 141  # exit code that a shell reports for a program killed by SIGPIPE


def run(main: Callable[[], int | None], *, trains: bool = False) -> NoReturn:
    """Call `main` and exit with the code from `exit_code`.

    The reason is sent to the other hosts of a run, so that none of them waits for this one.
    trains: `main` computes training steps; the process may start again first (`use_huge_pages`).
    """
    asks_for_help = not {"-h", "--help"}.isdisjoint(sys.argv)
    if not trains or asks_for_help or not use_huge_pages():
        keep_freed_memory()
    code, reason = exit_code(main)
    if distributed := sys.modules.get("hnet.runtime.distributed"):
        distributed.leave(code, reason)
    sys.exit(code)


def end_without(library: str, *, extra: str) -> NoReturn:
    """End a command that cannot be imported without the library that an extra installs."""
    print(
        f"error: the library {library} is missing: pip install 'hnet-jax[{extra}]'", file=sys.stderr
    )
    sys.exit(BAD_INPUT)


def exit_code(main: Callable[[], int | None]) -> tuple[int, str]:
    """Call `main` and return (exit code, reason of a failure).

    Bad input prints one line on stderr and gives code 2; a failure with good input prints one line
    and gives code 1. A traceback is printed only for errors in the program itself.
    """
    reason = ""
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = OUTPUT_CLOSED
    except (ConfigError, Failed) as e:
        reason = f"error: {one_line(e)}"
        code = BAD_INPUT if isinstance(e, ConfigError) else FAILED
        print(reason, file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except OSError as e:
        if e.errno not in _NO_ROOM:
            return _of_program(e)
        what = f"{e.filename or 'a file'} cannot be written ({e.strerror})"
        reason, code = (
            f"error: {one_line(Failed(what))}: free some room or use another disk",
            FAILED,
        )
        print(reason, file=sys.stderr)
    except Exception as e:
        return _of_program(e)
    return code, reason


def _of_program(e: Exception) -> tuple[int, str]:
    """Exit code and reason of an error that is not the user's; it is printed with its traceback."""
    if distributed := sys.modules.get("hnet.runtime.distributed"):
        distributed.wait_for_dead_host(e)
    traceback.print_exc()
    return FAILED, f"{type(e).__name__}: {e}"


def one_line(error: Exception) -> str:
    """The message in one line of at most `_LINE` characters, with line breaks and control
    characters escaped."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= _LINE else f"{text[: _LINE - 305]} ... {text[-300:]}"


class OneLineParser(argparse.ArgumentParser):
    """argparse for options that are not fields of a configuration: no abbreviations, the
    description is not reformatted, and errors raise ConfigError instead of printing the usage."""

    def __init__(self, **settings):
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=kind, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def number(kind: type, low: float, high: float) -> Callable[[str], int | float]:
    """`type` for an argparse option: a finite number from `low` to `high`."""

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also true for NaN
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{shown(text)}: use {what} from {low} to {high}")
        return value

    return read


def file_path(text: str) -> str:
    """`type` for an argparse option that names a file or folder."""
    if problem := NamesFile().problem(text):
        raise argparse.ArgumentTypeError(f"{shown(text)}: {problem}")
    return text


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Pause the collection of garbage; what was made meanwhile is left out of it from then on."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def parse(cls: type, default: Any = None, argv: Sequence[str] | None = None) -> Any:
    """Read a dataclass from the command line; fields that are not given keep their defaults.

    `--help` prints the docstring of the module of `cls` and its fields, `--help FIELD` those of a
    section. Raises ConfigError.
    """
    argv = sys.argv[1:] if argv is None else argv
    content = command_help.defaults(cls) if default is None else fields.to_json(default)
    if (topic := help_topic(argv)) is not None:
        print(command_help.of_options(cls, content, topic))
        raise SystemExit(0)
    return with_words(cls, content, argv)


def help_topic(argv: Sequence[str]) -> str | None:
    """The word after `--help` or `-h`, "" if there is none; None without `--help` or `-h`."""
    for i, word in enumerate(argv):
        if word in ("--help", "-h"):
            topic = argv[i + 1] if i + 1 < len(argv) else ""
            return topic.strip("-").replace("-", "_")
    return None


def with_words(cls: type, content: Any, argv: Sequence[str]) -> Any:
    """A `cls` from JSON content and command-line words that change it, outer fields first."""
    options = split_words(argv)
    for path in sorted(options, key=lambda path: path.count(".")):
        parent, key, hint = _locate(cls, content, path)
        parent[key] = value_of(hint, options[path], path)
    return fields.from_json(cls, content)


def _locate(cls: type, content: Any, path: str) -> tuple[Any, str | int, Any]:
    try:
        return locate(cls, content, path)
    except FieldError as e:
        if (now := _renamed(cls, path)) != path:
            raise FieldError(f"field {path} is called {now} now") from None
        if near := command_help.same_name(cls, content, path):
            raise FieldError(f"unknown field {path}: did you mean {near}?") from None
        raise FieldError(f"{e} (see --help)") from None


def _renamed(cls: type, path: str) -> str:
    """The current path of a field that had another name in an earlier version (`cls.renamed`)."""
    for before, name in getattr(cls, "renamed", {}).items():
        if f"{path}.".startswith(f"{before}."):
            path = ".".join([*before.split(".")[:-1], name]) + path[len(before) :]
    return path


def check_words(cls: type, argv: Sequence[str]) -> None:
    """Raise ConfigError for invalid values of fields of `cls`; words for other fields are ignored.

    Each field is checked separately against the defaults, so this needs no configuration.
    """
    content = command_help.defaults(cls)
    for path, words in split_words(argv).items():
        if path.partition(".")[0] in content:
            _, _, hint = _locate(cls, content, path)
            fields.from_json(hint, value_of(hint, words, path), path)


def split_words(argv: Sequence[str]) -> dict[str, list[str]]:
    """`--a.b x y --c=z` -> {"a.b": ["x", "y"], "c": ["z"]}. The last of equal names is used."""
    found: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, has_value, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found.pop(name, None)
            found[name] = values = [value] if has_value else []
            values = None if has_value else values
        elif values is None:
            raise ConfigError(f"unexpected {shown(word)}: settings are --field VALUE (see --help)")
        else:
            values.append(word)
    return found


def value_of(hint: Any, words: list[str], path: str) -> Any:
    """JSON content of a field of type `hint` from its words; `from_json` checks it later.

    A tuple takes any number of words; a tuple of tuples takes words such as Han+Hiragana. A
    section, a part and a tuple can also be given as JSON.
    """
    for option in fields.options(hint):
        with contextlib.suppress(FieldError):
            content = value_of(option, words, path)
            fields.from_json(option, content, path)
            return content
    if fields.options(hint) and len(words) == 1:
        return words[0]
    hint = fields.unwrap(hint)
    is_tuple = typing.get_origin(hint) is tuple
    if is_tuple or fields.is_part(hint) or fields.is_section(hint):
        if len(words) == 1 and words[0].startswith(("[", "{")):
            return _from_json_text(words[0], path)
    if is_tuple:
        kinds = typing.get_args(hint)
        kinds = kinds[:1] * len(words) if kinds[-1] is Ellipsis else kinds
        nested = [typing.get_origin(kind) is tuple for kind in kinds]
        split = [w.split("+") if inner else [w] for w, inner in zip(words, nested)]
        found = [value_of(kind, own, path) for kind, own in zip(kinds, split)]
        return found + words[len(kinds) :]  # too many words: `from_json` raises
    if len(words) != 1:
        given = f"{len(words)} were given: {shown(' '.join(words))}" if words else "none was given"
        raise FieldError(f"{path} takes one value ({fields.type_text(hint)}), {given}")
    return _scalar(hint, words[0])


def _scalar(hint: Any, word: str) -> Any:
    """The word converted to the type, or unchanged if it cannot be converted."""
    if typing.get_origin(hint) is typing.Literal:
        return next((option for option in typing.get_args(hint) if str(option) == word), word)
    if hint is bool or hint is type(None):
        return {"true": True, "false": False, "none": None}.get(word.lower(), word)
    try:
        return hint(word) if hint in (int, float) else word
    except ValueError:
        return word


def _from_json_text(text: str, path: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as e:
        raise FieldError(f"{path}={shown(text)} is not JSON: {one_line(e)}") from None
