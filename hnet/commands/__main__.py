"""The command `hnet`, also started as `python -m hnet.commands`."""

import importlib
import sys

from hnet import command_line
from hnet.errors import ConfigError

COMMANDS = {
    "segment": "hnet.commands.segment",
    "generate": "hnet.commands.generate",
    "evaluate": "hnet.commands.evaluate",
    "convert": "hnet.interop.__main__",
    "verify": "hnet.interop.__main__",
    "checkpoint": "hnet.checkpoint.__main__",
}


def dispatch() -> int | None:
    """Run the command that the first word names, with the other words as its arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help"):
        print(usage())
        return None
    if name not in COMMANDS:
        raise ConfigError(f"command {name!r} is unknown: use {', '.join(COMMANDS)}")
    module = COMMANDS[name]
    if module != "hnet.interop.__main__":  # it reads its command's name itself
        sys.argv = [f"hnet {name}", *sys.argv[2:]]
    return importlib.import_module(module).main()


def usage() -> str:
    """One line per module of commands: the first line of its docstring."""
    lines = ["usage: hnet COMMAND ...; hnet COMMAND --help describes its options", ""]
    names: dict[str, list[str]] = {}
    for name, module in COMMANDS.items():
        names.setdefault(module, []).append(name)
    for module, its_names in names.items():
        doc = importlib.import_module(module).__doc__ or ""
        lines.append(f"  {', '.join(its_names):<17}{doc.splitlines()[0]}")
    lines += [
        "",
        "Training and studies are started in a clone: python -m experiments.pretrain --help",
    ]
    return "\n".join(lines)


def main() -> None:
    """Entry point of the console command; as with `python -m`, imports find the working directory,
    which may hold the classes that a run names."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    command_line.run(dispatch)


if __name__ == "__main__":
    main()
