"""Configurations by name, from a file or from a function, with the words of a command line.

A name is defined by a file of `PACKAGE`. Names and their docstrings are read from the source
without importing it, so that a broken file affects only its own names. The package is
imported when a name is asked for.
"""

import ast
import dataclasses
import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hnet import command_help, fields
from hnet.command_line import check_words, help_topic, no_collection, split_words, with_words
from hnet.dotted import flatten, put
from hnet.errors import ConfigError, shown
from hnet.files import read_json
from hnet.parts import find_object
from hnet.train.sections import Sections

if TYPE_CHECKING:
    from hnet.train.config import Config

PACKAGE = "experiments.configs"
"""package whose files define names; its docstring says how"""
FACTS = ("Paper", "Fidelity", "Test")
"""what the docstring of a published system says besides its first line"""


@dataclass(frozen=True)
class Named:
    """A configuration that is loaded by its name."""

    file: Path
    function: str
    """function name; "" if the file cannot be read"""
    summary: str
    """first line of the docstring, or what is wrong with the file"""
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    """the paragraphs of the docstring that begin with a name of `FACTS`"""

    def load(self) -> "Config":
        """The configuration. Any error in the file becomes a one-line ConfigError that names it."""
        if not self.function:
            raise ConfigError(f"{self.file}: {self.summary}")
        try:
            module = importlib.import_module(f"{PACKAGE}.{self.file.stem}")
            return as_run(getattr(module, self.function)())
        except ConfigError as e:
            raise ConfigError(f"{self.file}: {e}") from None
        except Exception as e:
            raise ConfigError(_where_and_what(e, self.file)) from None


def _where_and_what(error: Exception, file: Path) -> str:
    lines = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == file
    ]
    return f"{file}, line {lines[-1] if lines else 1}: {type(error).__name__}: {error}"


def as_run(found: Any) -> "Config":
    """`found`, or, if it is a network, the default configuration with this network."""
    from hnet.config import HNetConfig  # here: names and words are checked before JAX is loaded
    from hnet.train.config import Config

    if isinstance(found, HNetConfig):
        return dataclasses.replace(base_config("default"), model=found)
    if not isinstance(found, Config):
        raise ConfigError(f"{shown(found)} is no Config and no HNetConfig: return one")
    return found


def folder() -> Path:
    """The folder of `PACKAGE`. Raises ConfigError if it is not there, as outside of a clone."""
    try:
        return Path(importlib.import_module(PACKAGE).__path__[0])
    except ImportError:
        raise ConfigError(
            f"names of configurations are files of {PACKAGE}, which is not here: start in a clone "
            "of the repository, or give a .json file or package.module:function"
        ) from None


def named_configs() -> dict[str, Named]:
    """All names: files in alphabetical order, functions in source order."""
    found: dict[str, Named] = {}
    for file in sorted(folder().glob("*.py")):
        if file.name != "__init__.py":
            for name, named in _named_in(file):
                if name in found:
                    why = f"gives the name {name!r}, which {found[name].file} gives too"
                    named = Named(file, "", why)
                found[name] = named
    return found


def _named_in(file: Path) -> list[tuple[str, Named]]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as e:
        return [(file.stem, Named(file, "", f"line {e.lineno}: {e.msg}"))]
    except (OSError, ValueError) as e:
        return [(file.stem, Named(file, "", f"cannot be read: {e}"))]
    found = []
    for node in tree.body:
        match node:
            case ast.FunctionDef(returns=ast.Name(id="Config" | "HNetConfig")):
                has_arguments = bool(node.args.args or node.args.kwonlyargs)
                if not has_arguments and not node.name.startswith("_"):
                    is_file = node.name == "config"
                    name = file.stem if is_file else node.name.removeprefix("config_")
                    doc = ast.get_docstring(tree if is_file else node) or "(no docstring)"
                    named = Named(file, node.name, doc.splitlines()[0], facts_of(doc))
                    found.append((name, named))
    return found


def facts_of(doc: str) -> dict[str, str]:
    """The facts in a docstring: name of `FACTS` -> text up to the next fact or an empty line."""
    start = f"^({'|'.join(FACTS)}): "
    found = re.findall(rf"{start}(.+?)(?=\n\n|{start}|\Z)", doc, re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text, *_ in found}


def base_config(name: str) -> "Config":
    """The configuration given by a name, a JSON file or "package.module:function"."""
    if name.lower().endswith(".json"):
        return _from_file(Path(name))
    if ":" in name:
        return _from_function(name)
    return dataclasses.replace(_named(name).load(), workdir=f"runs/{name}")


def _named(name: str) -> Named:
    known = named_configs()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}"
        raise ConfigError(
            f"configuration {shown(name)} is unknown: {hint} (or a .json file, or "
            "package.module:function)"
        )
    return known[name]


def _from_function(place: str) -> "Config":
    made = find_object(place, "configuration")
    if not callable(made):
        module, _, function = place.partition(":")
        raise ConfigError(f"configuration {place!r}: {module} has no function {function!r}")
    return as_run(made())


def _from_file(path: Path) -> "Config":
    """A complete configuration, an official network, or the differences from "base"."""
    from hnet.config import HNetConfig
    from hnet.train.config import Config, config_from_json

    content = read_json(path, "configuration file")
    where = f"configuration file {str(path)!r}"
    if isinstance(content, dict) and "arch_layout" in content:
        run = as_run(HNetConfig.from_json(content))
        return dataclasses.replace(run, workdir=f"runs/{path.stem}")
    if not isinstance(content, dict) or "base" not in content:
        return config_from_json(content)
    name = content.pop("base")
    if not isinstance(name, str) or name.lower().endswith(".json"):
        raise ConfigError(f"{where}: base={shown(name)} is no name of a configuration")
    base = fields.to_json(base_config(name))
    changes = {"workdir": f"runs/{path.stem}", **flatten(content)}
    put(Config, base, changes)
    return config_from_json(base)


def run_config(argv: Sequence[str] | None = None, default: str = "default") -> "Config":
    """`[NAME] [--section.field VALUE ...]` -> the resolved configuration.

    `--help [SECTION]` prints what can be set and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    name, is_named = default, bool(argv) and not argv[0].startswith("-")
    if is_named:
        name, argv = argv[0], argv[1:]
    topic = help_topic(argv)
    if topic is None:
        check_words(Sections, argv)
    if not name.lower().endswith(".json") and ":" not in name:
        _named(name)
    with no_collection():  # imports are a fifth faster
        from hnet.train.config import Config

    base = base_config(name)
    if topic is None and not is_named:
        base = _like_weights(base, argv)
    content = fields.to_json(base)
    if topic is not None:
        print(help_text(content, topic))
        raise SystemExit(0)
    return with_words(Config, content, argv)


def _like_weights(base: "Config", argv: Sequence[str]) -> "Config":
    """`base` with the architecture of the weights in `--init.from`, and their special tokens.

    A run that has begun needs the weights no longer: its own configuration has all this.
    """
    from hnet.train.initial_weights import described
    from hnet.train.workdir import read_config

    words = split_words(argv)
    given = words.get("init.from")
    if not given or len(given) != 1 or not given[0]:
        return base
    workdir = (words.get("workdir") or [base.workdir])[0]
    try:
        run = read_config(workdir)
    except ConfigError:
        run = None
    if run and run.init.from_ == given[0]:
        model, data = run.model, run.data
    else:
        model, data = described(given[0])
    data = dataclasses.replace(base.data, bos_eos=data.bos_eos, tokenizer=data.tokenizer)
    return dataclasses.replace(base, model=model, data=data)


def help_text(content: Any, topic: str = "") -> str:
    """The settings of the run with this JSON content: all sections, or those below `topic`."""
    from hnet.train.config import Config

    if topic:
        return command_help.of_topic(Config, content, topic)
    program = sys.modules["__main__"].__doc__ or ""
    names = command_help.table([("", ", ".join(named_configs()))])
    names = f"NAME is one of (experiments.pretrain --list says what each is)\n{names}"
    return "\n\n".join([program.strip(), names, command_help.level(Config, content)])


def list_text() -> str:
    """Every name with its summary."""
    rows = [(name, named.summary) for name, named in named_configs().items()]
    return f"NAME is one of\n{command_help.table(rows)}"
