"""Commands as data, printed and run only with `go`; and the reports of hosts."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from hnet.errors import ConfigError
from hnet.printable import printable
from hnet.runtime.distributed import REQUEUE_EXIT_CODE


class LaunchError(RuntimeError):
    """A command or a run failed; the message is one line that says which and what to do."""


@dataclass(frozen=True)
class Step:
    """One command and why it is run."""

    why: str
    argv: tuple[str, ...]
    costs: bool = False
    """whether it starts, or may prolong, something that is billed"""
    may_fail: bool = False
    """whether its failure is an answer and not an error"""


class Runner:
    """Prints each step; with `go` also runs it."""

    def __init__(self, go: bool, out: IO[str] | None = None):
        self.go, self.out = go, out or sys.stdout

    def say(self, text: str) -> None:
        """Print lines; characters that could control the terminal are written as their number."""
        print(printable(text, keep="\n\t"), file=self.out, flush=True)

    def run(self, step: Step, *, capture: bool = False) -> str:
        """The command's stdout if `capture`, else "". Raises LaunchError if it fails."""
        self.say(f"\n# {step.why}" + ("   [COSTS MONEY]" if step.costs else ""))
        self.say(shell_line(step.argv))
        if not self.go:
            return ""
        try:
            done = subprocess.run(
                step.argv, stdout=subprocess.PIPE if capture else None, text=True, errors="replace"
            )
        except OSError as e:
            raise LaunchError(f"{step.argv[0]} cannot be started: {e.strerror}") from None
        if done.returncode and not step.may_fail:
            words = shell_line(step.argv[:5])
            raise LaunchError(f"{words} ... ended with exit code {done.returncode}: see above")
        return done.stdout or ""

    def write(self, path: Path, text: str, why: str) -> None:
        """Write a generated file; an existing one with other content is kept beside it."""
        self.say(f"\n# {why}: {path}")
        if not self.go:
            self.say(text.rstrip("\n"))
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text() != text:
            n = 1
            while (kept := path.with_name(f"{path.name}.{n}")).exists():
                n += 1
            path.rename(kept)
        path.write_text(text)


def shell_line(words: Sequence[str]) -> str:
    """One line that bash reads as these words, without terminal control characters."""
    return " ".join(shlex.quote(w) if w.isprintable() else _numbered(w) for w in words)


def _numbered(word: str) -> str:
    """A word in bash's form $'...'; bytes that are not plain characters are written as numbers."""
    plain = (c if " " <= c <= "~" and c not in "\\'" else _bytes(c) for c in word)
    return "$'" + "".join(plain) + "'"


def _bytes(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))


def check_name(field: str, value: str) -> str:
    """A name valid in Google Cloud, Kubernetes and file systems. Raises ConfigError otherwise."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,37}[a-z0-9])?", value):
        raise ConfigError(
            f"{field}={value!r}: use 1 to 39 of a-z, 0-9 and '-', a letter first, no '-' last"
        )
    return value


def check_word(field: str, value: str) -> str:
    """A word that no shell, YAML or #SBATCH line can misread. Raises ConfigError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_./:@%+=,][A-Za-z0-9_./:@%+=,-]*", value):
        raise ConfigError(f"{field}={value!r}: use letters, digits and _./:@%+=,- only")
    return value


class HostReport(NamedTuple):
    """One host's report about the run, from a line of tpu/host.sh or from a pod."""

    host: int
    name: str
    state: str
    """state of the run: running, ended or absent (unknown to this host)"""
    code: int | None = None
    at: float | None = None
    """end of the run in seconds since the epoch"""
    stopped: bool = False
    """whether it was asked to stop permanently"""

    def __str__(self) -> str:
        end = "" if self.code is None else f", exit code {self.code}"
        return f"host {self.host} ({self.name}): {self.state}{end}"


_REPORT = re.compile(
    r"HNET host=(\d{1,6}) name=(\S+) state=(running|ended|absent) code=(-|\d{1,3})"
    r" at=(-|\d{1,12}(?:\.\d*)?)(?: .*)?"
)


def parse_report(line: str) -> HostReport | None:
    """The report that tpu/host.sh writes as one line; None for any other line."""
    found = _REPORT.fullmatch(line)
    if found is None:
        return None
    host, name, state, code, at = found.groups()
    return HostReport(
        int(host),
        name,
        state,
        None if code == "-" else int(code),
        None if at == "-" else float(at),
        line.endswith(" stopped=yes"),
    )


def parse_reports(text: str) -> list[HostReport]:
    """The reports among the lines of `text`; anything else is ignored."""
    return [report for line in text.splitlines() if (report := parse_report(line))]


def worst_first(reports: Sequence[HostReport]) -> list[HostReport]:
    """Failed hosts first, the earliest failure on top, since it is the one to read."""

    def key(report: HostReport):
        failed = report.code not in (None, 0, REQUEUE_EXIT_CODE)
        rank = 0 if failed else 1 if report.code else 2 if report.code is None else 3
        return rank, report.at or 0.0, report.host

    return sorted(reports, key=key)


def verdict(reports: Sequence[HostReport]) -> str:
    """``running``, ``done``, ``requeue``, ``failed`` or ``lost`` (a host does not know the run).

    The first host that ended with an exit code other than 0 decides: the others end because of it.
    """
    bad = sorted((r for r in reports if r.code), key=lambda r: r.at or 0.0)
    if bad and bad[0].code != REQUEUE_EXIT_CODE:
        return "failed"
    if any(r.state == "running" for r in reports):
        return "running"
    if bad:
        return "requeue"
    return "lost" if any(r.state == "absent" for r in reports) else "done"
