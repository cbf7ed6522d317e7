"""Runs on TPU VMs, GKE and Slurm: create, setup, run, logs, status, stop.

    python -m tpu.launch tpu-vm create NAME --project P --zone Z --accelerator v5litepod-16 --spot
    python -m tpu.launch tpu-vm run NAME ... -- python -m experiments.pretrain --workdir DIR

prints the commands; with --go it runs them. Nothing that is billed starts without --go, and such
steps are marked [COSTS MONEY]. See tpu/README.md for a walk-through. Exit codes: 0 done, 1 a
command or the run failed, 2 bad input, 75 the run asks to be started again.
"""

import argparse
import sys
from collections.abc import Sequence

from hnet.command_line import OneLineParser, file_path, number, one_line
from hnet.errors import ConfigError
from hnet.outputs import local_folder
from hnet.printable import printable
from tpu import gke, slurm, tpu_vm
from tpu.commands import LaunchError, Runner, check_name, check_word
from tpu.settings import VIA, keep, recall

ACTIONS = ("create", "setup", "run", "logs", "status", "stop")
PLATFORMS = {"tpu-vm": tpu_vm, "gke": gke, "slurm": slurm}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        runner = Runner(options.go)
        check_name("name", options.name)
        recall(options)
        _check(options)
        if options.go:
            keep(options)
        runner.say("# running" if options.go else "# dry run: nothing is executed without --go")
        return getattr(PLATFORMS[options.platform], options.action)(options, runner) or 0
    except ConfigError as e:
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 2
    except LaunchError as e:
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"error: {printable(e.filename)}: {e.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what was started goes on", file=sys.stderr)
        return 130


REQUIRED = {"tpu-vm": ("project", "zone"), "gke": ("project", "zone", "cluster")}


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for given or recalled options that cannot work."""
    local_folder(options.state, "state")
    required = REQUIRED.get(options.platform, ())
    if options.platform == "gke" and options.action in ("setup", "run"):
        required += ("image",)
    for field in required:
        if not getattr(options, field):
            raise ConfigError(f"{field} is not known yet: give --{field}")
    for field in ("project", "zone", "accelerator", "runtime_version", "bucket", "cluster", "image",
                  "service_account", "home", "partition", "account", "time"):  # fmt: skip
        if (value := getattr(options, field, None)) is not None:
            check_word(field.replace("_", "-"), value)
    if getattr(options, "via", None) not in (None, *VIA):
        raise ConfigError(f"via={options.via!r}: use {' or '.join(VIA)}")
    if options.action == "run" and not options.command:
        raise ConfigError(
            "run needs a command after --, e.g. -- python -m experiments.pretrain --workdir DIR"
        )
    for word in options.command:
        if any("\ud800" <= c <= "\udfff" for c in word):
            raise ConfigError(f"command: {printable(word)} is not UTF-8")
        if "\0" in word:
            raise ConfigError(f"command: {word!r} holds a NUL, which no command can be given")
    if options.command and not options.command[0]:
        raise ConfigError("command: its first word is empty: name a program")
    PLATFORMS[options.platform].check(options)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    arguments = list(arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = OneLineParser(prog="python -m tpu.launch", description=__doc__)
    platforms = parser.add_subparsers(dest="platform", required=True, metavar="PLATFORM")
    adders = {"tpu-vm": _add_tpu_vm, "gke": _add_gke, "slurm": _add_slurm}
    for name, module in PLATFORMS.items():
        platform = platforms.add_parser(name, help=(module.__doc__ or "").split("\n")[0])
        actions = platform.add_subparsers(dest="action", required=True, metavar="ACTION")
        for action in ACTIONS:
            one = actions.add_parser(action)
            _add_common(one, action)
            adders[name](one, action)
    options = parser.parse_args(arguments[:cut])
    options.command = arguments[cut + 1 :]
    return options


DAY = 86400
_SECONDS = number(float, 0, DAY)
_COUNT = number(int, 0, 1_000_000)
_AT_LEAST_ONE = number(int, 1, 1_000_000)


def _add_common(parser: argparse.ArgumentParser, action: str) -> None:
    parser.add_argument("name", help="of the run, and of what is created for it")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--go", action="store_true", help="run the commands")
    how.add_argument("--dry-run", action="store_true", help="only print them (the default)")
    parser.add_argument(
        "--state", type=file_path, default="runs/launch", help="folder for generated files"
    )
    if action == "run":
        parser.add_argument("--max-restarts", type=_COUNT, default=100, metavar="N")
        parser.add_argument(
            "--stagger", type=_SECONDS, default=0.5, metavar="S", help="host i starts i * S s later"
        )
    if action in ("run", "logs"):
        parser.add_argument(
            "--lines", type=_COUNT, default=40, metavar="N", help="of each host's log"
        )
    if action == "stop":
        parser.add_argument("--delete", action="store_true", help="also give the hardware back")
        parser.add_argument(
            "--grace",
            type=number(int, 0, DAY),
            default=300,
            metavar="S",
            help="time to save, then it is killed",
        )


def _add_tpu_vm(parser: argparse.ArgumentParser, action: str) -> None:
    parser.add_argument("--project")
    parser.add_argument("--zone")
    parser.add_argument("--accelerator", help="default v5litepod-16, that is a v5e-16")
    parser.add_argument("--runtime-version", help="default: that of the accelerator")
    parser.add_argument("--spot", action="store_true", help="cheaper, may be taken away any time")
    parser.add_argument("--bucket", help="Cloud Storage bucket, mounted at /mnt/hnet")
    parser.add_argument("--poll", type=number(float, 0.001, DAY), default=60.0, metavar="S")
    for name in ("--create-arg", "--ssh-arg"):
        parser.add_argument(name, action="append", default=[], metavar="FLAG", help="passed on")
    if action == "run":
        parser.add_argument(
            "--watch", action="store_true", help="stay, and restart on exit code 75"
        )
        parser.add_argument("--attach", action="store_true", help="watch what runs already")
        parser.add_argument("--recreate", action="store_true", help="also after preemption [COSTS]")


def _add_gke(parser: argparse.ArgumentParser, action: str) -> None:
    parser.add_argument("--project")
    parser.add_argument("--zone")
    parser.add_argument("--cluster")
    parser.add_argument("--accelerator", help="default v5litepod-16, that is a v5e-16")
    parser.add_argument("--via", choices=VIA, help="default jobset")
    parser.add_argument("--spot", action="store_true")
    parser.add_argument("--bucket", help="Cloud Storage bucket, mounted at /mnt/hnet (jobset)")
    parser.add_argument("--service-account", help="Kubernetes one that may use the bucket")
    if action in ("setup", "run"):
        parser.add_argument("--image", help="REGISTRY/NAME:TAG to push and run")
    if action == "create":
        parser.add_argument("--existing-cluster", action="store_true", help="add a node pool only")


def _add_slurm(parser: argparse.ArgumentParser, action: str) -> None:
    parser.add_argument("--home", help="shared folder of code and runs (default ~/hnet-launch)")
    if action == "run":
        parser.add_argument("--nodes", type=_AT_LEAST_ONE, default=1)
        parser.add_argument("--gpus-per-node", type=_AT_LEAST_ONE, default=8)
        parser.add_argument("--cpus-per-gpu", type=_AT_LEAST_ONE, default=8)
        parser.add_argument("--time", default="24:00:00", help="limit; 5 min before, it saves")
        parser.add_argument("--partition")
        parser.add_argument("--account")


if __name__ == "__main__":
    sys.exit(main())
