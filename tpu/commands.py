"""Commands as data: printed for people, run only when told to; and what hosts report back."""

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
from hnet.train.distributed import REQUEUE_EXIT_CODE


class LaunchError(RuntimeError):
    """A command failed, or a run did: one line that says which and what to do."""


@dataclass(frozen=True)
class Step:
    """One command and why it is run."""

    why: str
    argv: tuple[str, ...]
    costs: bool = False
    """starts, or may prolong, something that is billed"""
    may_fail: bool = False
    """its failure is an answer, not an error"""


class Runner:
    """Prints each step; with `go` also runs it."""

    def __init__(self, go: bool, out: IO[str] | None = None):
        self.go, self.out = go, out or sys.stdout

    def say(self, text: str) -> None:
        """Print lines; what could steer the terminal is written as its number."""
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
        """Write a generated file; another content that is there is kept beside it."""
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
    """One line that bash reads as these words, with nothing in it that a terminal obeys."""
    return " ".join(shlex.quote(w) if w.isprintable() else _numbered(w) for w in words)


def _numbered(word: str) -> str:
    """A word in bash's form $'...', its bytes as numbers where they are no plain character."""
    plain = (c if " " <= c <= "~" and c not in "\\'" else _bytes(c) for c in word)
    return "$'" + "".join(plain) + "'"


def _bytes(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))


def check_name(field: str, value: str) -> str:
    """A name that Google Cloud, Kubernetes and a file system all take. Raises ConfigError."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,37}[a-z0-9])?", value):
        raise ConfigError(
            f"{field}={value!r}: use 1 to 39 of a-z, 0-9 and '-', a letter first, no '-' last"
        )
    return value


def check_word(field: str, value: str) -> str:
    """A word that no shell, YAML or #SBATCH line could misread. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9_./:@%+=,][A-Za-z0-9_./:@%+=,-]*", value):
        raise ConfigError(f"{field}={value!r}: use letters, digits and _./:@%+=,- only")
    return value


class HostReport(NamedTuple):
    """What one host says about the run, from a line of tpu/host.sh or from a pod."""

    host: int
    name: str
    state: str
    """running, ended or absent (this host knows nothing of the run)"""
    code: int | None = None
    at: float | None = None
    """seconds since the epoch when it ended"""
    stopped: bool = False
    """somebody asked it to stop for good"""

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
    """Failed hosts first, the earliest of them on top, for it is the one to read."""

    def key(report: HostReport):
        failed = report.code not in (None, 0, REQUEUE_EXIT_CODE)
        rank = 0 if failed else 1 if report.code else 2 if report.code is None else 3
        return rank, report.at or 0.0, report.host

    return sorted(reports, key=key)


def verdict(reports: Sequence[HostReport]) -> str:
    """``running``, ``done``, ``requeue``, ``failed`` or ``lost`` (a host forgot the run).

    The host that ended first with something else than 0 decides: the others end because of it.
    """
    bad = sorted((r for r in reports if r.code), key=lambda r: r.at or 0.0)
    if bad and bad[0].code != REQUEUE_EXIT_CODE:
        return "failed"
    if any(r.state == "running" for r in reports):
        return "running"
    if bad:
        return "requeue"
    return "lost" if any(r.state == "absent" for r in reports) else "done"
