"""One command line for all experiments: `NAME [--section.field VALUE ...]`, errors in one line."""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import tyro

import experiments.configs
from hnet.config import HNetConfig
from hnet.errors import ConfigError
from hnet.train.checkpoint import CheckpointError
from hnet.train.config import Config, config_from_json
from hnet.train.cpu import keep_freed_memory
from hnet.train.distributed import BarrierTimeout, leave

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
NOBODY_READS = 141  # as a shell says of a program that SIGPIPE ended


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with its code; bad input ends in one line on stderr and code 2.

    The other hosts of a run are told why this one ends, so that none waits for it.
    """
    reason = ""
    keep_freed_memory()
    try:
        code = main() or 0
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        code = NOBODY_READS
    except (ConfigError, BarrierTimeout, CheckpointError) as e:
        reason, code = f"error: {' '.join(str(e).split())}", BAD_INPUT
        if not isinstance(e, ConfigError):
            code = FAILED
        print(reason, file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    except Exception as e:
        traceback.print_exc()
        reason, code = f"{type(e).__name__}: {e}", FAILED
    leave(code, reason)
    sys.exit(code)


class OneLineParser(argparse.ArgumentParser):
    """argparse for options beside the fields of a configuration: no abbreviations, the description
    as it is written, and ConfigError in the place of usage and exit."""

    def __init__(self, **settings):
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=kind, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def parse(cls: Any, default: Any = None, argv: list[str] | None = None) -> Any:
    """Read a dataclass from the command line. Raises ConfigError instead of printing a box."""
    argv = sys.argv[1:] if argv is None else argv
    complaint = io.StringIO()
    settings = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, args=argv, config=(tyro.conf.FlagConversionOff,), **settings)
    except SystemExit as e:
        if not e.code:
            raise
        raise ConfigError(_one_line(complaint.getvalue())) from None


def _one_line(box: str) -> str:
    """The message of tyro's framed error, and its first suggestion, without frame and title."""
    inside = [line for line in box.splitlines() if not line.lstrip().startswith("╭")]
    lines = [re.sub(r"[─╰╯│]+", " ", line).strip() for line in inside]
    lines = [line for line in lines if line and not line.startswith("For full helptext")]
    message, _, hints = "\n".join(lines).partition("Perhaps you meant:")
    message = re.split(r"Argument helptext:", message)[0]
    hint = re.search(r"--\S+", hints)
    text = " ".join(message.split())
    return f"{text}; did you mean {hint.group()}?" if hint else f"{text} (see --help)"


def named_configs() -> dict[str, str]:
    """Names that `pretrain` takes and the first line of what they are."""
    modules = {m.name for m in pkgutil.iter_modules(experiments.configs.__path__)}
    found = {}
    for name in sorted(modules):
        module = importlib.import_module(f"experiments.configs.{name}")
        if hasattr(module, "config"):
            found[name] = (module.__doc__ or "").strip().splitlines()[0]
    return found


def base_config(name: str) -> Config:
    """The configuration of an experiment file, or of a JSON file (ours, or an official one)."""
    if name.endswith(".json"):
        return _from_file(Path(name))
    if name not in named_configs():
        raise ConfigError(
            f"configuration {name!r} is unknown: use a .json file or one of "
            f"{', '.join(named_configs())}"
        )
    return importlib.import_module(f"experiments.configs.{name}").config()


def _from_file(path: Path) -> Config:
    try:
        content = json.loads(path.read_text())
    except OSError as e:
        raise ConfigError(f"configuration file {str(path)!r}: {e.strerror}") from None
    except ValueError as e:
        raise ConfigError(f"configuration file {str(path)!r} is not JSON: {e}") from None
    if isinstance(content, dict) and "arch_layout" in content:
        model = HNetConfig.from_json(content)
        return dataclasses.replace(base_config("default"), model=model, workdir=f"runs/{path.stem}")
    return config_from_json(content)


def run_config(argv: list[str] | None = None, default: str = "default") -> Config:
    """`[NAME] [--section.field VALUE ...]` -> the resolved configuration."""
    argv = sys.argv[1:] if argv is None else argv
    name = default
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    return parse(Config, base_config(name), argv)
