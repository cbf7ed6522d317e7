"""Cloud TPU VMs: queued resources, and ssh to every worker of a slice."""

import argparse
import re
import shlex
import tempfile
import time
from pathlib import Path

from hnet.errors import ConfigError
from hnet.runtime.distributed import REQUEUE_EXIT_CODE
from tpu import bundle
from tpu.commands import (
    HostReport,
    LaunchError,
    Runner,
    Step,
    parse_report,
    parse_reports,
    verdict,
    worst_first,
)

HOME = "hnet-launch"  # below the home directory of each host; see tpu/host.sh
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
LEAVING, GONE = ("SUSPENDING", "DELETING"), ("SUSPENDED", "FAILED")
MAX_SILENT_POLLS = 5  # a short network failure is not a preemption
SECONDS_TO_DIE = 60


def family(accelerator: str) -> tuple[str, int]:
    """("v5litepod", 16) for "v5litepod-16". Raises ConfigError for an unknown type."""
    found = re.fullmatch(r"(v4|v5litepod|v5p|v6e)-([1-9][0-9]*)", accelerator)
    if found is None:
        raise ConfigError(
            f"accelerator={accelerator!r}: use v4-N, v5litepod-N, v5p-N or v6e-N "
            "(the Cloud TPU API does not serve TPU7x and later)"
        )
    return found[1], int(found[2])


def num_hosts(accelerator: str) -> int:
    """Number of hosts with 4 chips each; the size counts chips for v5e and v6e, else cores."""
    name, number = family(accelerator)
    if name in ("v5litepod", "v6e"):
        return 1 if number <= 8 else number // 4
    return max(1, number // 8)


def gcloud(options: argparse.Namespace, *words: str) -> tuple[str, ...]:
    place = (f"--project={options.project}", f"--zone={options.zone}")
    return ("gcloud", "compute", "tpus", *words, *place)


def ssh(options: argparse.Namespace, remote: list[str], *flags: str) -> tuple[str, ...]:
    command = f"--command={shlex.join(remote)}"
    words = ("tpu-vm", "ssh", options.name, "--worker=all", command)
    return gcloud(options, *words, *flags, *options.ssh_arg)


def host(options: argparse.Namespace, action: str, *words: str, **env: str) -> list[str]:
    settings = [f"{key}={value}" for key, value in env.items()]
    script = f"{HOME}/code/tpu/host.sh"
    return ["env", *settings, "bash", script, action, options.name, *words]


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that this platform cannot use."""
    family(options.accelerator)


# --- actions -------------------------------------------------------------------------------------


def create(options: argparse.Namespace, runner: Runner) -> None:
    runtime = options.runtime_version or RUNTIMES[family(options.accelerator)[0]]
    words = ["queued-resources", "create", options.name, f"--node-id={options.name}"]
    words += [f"--accelerator-type={options.accelerator}", f"--runtime-version={runtime}"]
    words += ["--spot"] if options.spot else []
    words += options.create_arg
    hosts = num_hosts(options.accelerator)
    why = f"ask for {options.accelerator} ({hosts} hosts); billed from ACTIVE until deleted"
    runner.run(Step(why, gcloud(options, *words), costs=True))
    _wait_until_active(options, runner)


def _state_step(options: argparse.Namespace, why: str) -> Step:
    words = ("queued-resources", "describe", options.name, "--format=value(state.state)")
    return Step(why, gcloud(options, *words), may_fail=True)


def _wait_until_active(options: argparse.Namespace, runner: Runner) -> None:
    """Wait for the slice, possibly for days. Ending this program does not withdraw the request."""
    seen, silent = None, 0
    while True:
        step = _state_step(options, f"every {options.poll:g} s, until it says ACTIVE")
        state = (runner if seen is None else _Quiet(runner)).run(step, capture=True).strip()
        if not runner.go or state == "ACTIVE":
            return
        silent = 0 if state else silent + 1
        if state in LEAVING + GONE or silent > MAX_SILENT_POLLS:
            raise LaunchError(
                f"the request for {options.name} is {state or 'not answered'}: see its reason with "
                "gcloud compute tpus queued-resources describe, then stop --delete and create"
            )
        if state != seen:
            runner.say(f"  {state or 'no answer'}")
        seen = state
        time.sleep(options.poll)


class _Quiet(Runner):
    """Runs without printing, for repeated queries."""

    def __init__(self, runner: Runner):
        super().__init__(runner.go, runner.out)

    def say(self, text: str) -> None:
        pass


def _archive(options: argparse.Namespace) -> Path:
    return Path(options.state) / options.name / "code.tar.gz"


def setup(options: argparse.Namespace, runner: Runner) -> None:
    runner.say(f"\n# pack the code, hash {bundle.code_hash()}: {_archive(options)}")
    if runner.go:
        bundle.write_bundle(_archive(options))
    _install(options, runner)


def _install(options: argparse.Namespace, runner: Runner) -> None:
    archive, script = _archive(options), bundle.ROOT / "tpu" / "setup.sh"
    incoming = f"{HOME}/incoming"
    runner.run(Step("a folder for it on every host", ssh(options, ["mkdir", "-p", incoming])))
    words = ("tpu-vm", "scp", str(archive), str(script), f"{options.name}:{incoming}/")
    copy = gcloud(options, *words, "--worker=all", *options.ssh_arg)
    runner.run(Step("copy it to every host", copy))
    remote = ["bash", f"{incoming}/setup.sh", "--accelerator", "tpu"]
    remote += ["--bundle", f"{incoming}/{archive.name}"]
    remote += ["--bucket", options.bucket] if options.bucket else []
    runner.run(Step("install on every host; repeating it is safe", ssh(options, remote)))


def run(options: argparse.Namespace, runner: Runner) -> int:
    environment = {
        "HNET_CODE_HASH": _shipped_hash(options) if options.attach else bundle.code_hash(),
        "HNET_CONFIG_HASH": bundle.config_hash(options.command),
        "HNET_STAGGER": str(options.stagger),
    }
    if options.attach:
        return watch(options, runner, environment)
    _start(options, runner, environment)
    return watch(options, runner, environment) if options.watch else 0


def _shipped_hash(options: argparse.Namespace) -> str:
    """Hash of the code that `setup` packed; a restart must find the same code on the hosts."""
    if not _archive(options).exists():
        raise ConfigError(f"{_archive(options)} does not exist: --attach needs that of setup")
    return bundle.archived_hash(_archive(options))


def _start(options: argparse.Namespace, runner: Runner, env: dict[str, str]) -> None:
    check = host(options, "check", **env)
    why = "on every host: no process left over, same code; nothing starts if one refuses"
    runner.run(Step(why, ssh(options, check)))
    remote = host(options, "start", *options.command, **env)
    runner.run(Step("start on every host, detached from this terminal", ssh(options, remote)))


def status(options: argparse.Namespace, runner: Runner) -> int:
    runner.run(_state_step(options, "state of the slice"))
    step = Step("the run on every host", ssh(options, host(options, "status")), may_fail=True)
    for report in worst_first(parse_reports(runner.run(step, capture=True))):
        runner.say(str(report))
    return 0


def logs(options: argparse.Namespace, runner: Runner) -> int:
    """Print the end of every host's log, the host that failed first on top."""
    with tempfile.TemporaryDirectory(prefix="hnet-logs-") as folder:
        remote = host(options, "logs", str(options.lines))
        command = ssh(options, remote, f"--output-directory={folder}")
        runner.run(Step("fetch the end of each host's log", command, may_fail=True))
        texts = [f.read_text(errors="replace") for f in sorted(Path(folder).glob("*.log"))]
    log_of = dict(filter(None, map(_split_log, texts)))
    for report in worst_first(list(log_of)):
        runner.say(f"\n==== {report}\n" + "\n".join(log_of[report]))
    return 0


def _split_log(text: str) -> tuple[HostReport, list[str]] | None:
    """(report of a host, which precedes its log, all other lines), or None without a report."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if report := parse_report(line):
            return report, lines[:i] + lines[i + 1 :]
    return None


def stop(options: argparse.Namespace, runner: Runner) -> int:
    remote = host(options, "stop", str(options.grace))
    why = f"ask every host to save and end; after {options.grace} s they are killed"
    runner.run(Step(why, ssh(options, remote), may_fail=True))
    if options.delete:
        _delete(options, runner, "give the slice back: this ends the bill")
    else:
        runner.say("\n# the slice is still billed; stop --delete gives it back   [COSTS MONEY]")
    return 0


def _delete(options: argparse.Namespace, runner: Runner, why: str) -> None:
    words = ("queued-resources", "delete", options.name, "--force", "--quiet")
    runner.run(Step(why, gcloud(options, *words)))


# --- supervision ---------------------------------------------------------------------------------


def watch(options: argparse.Namespace, runner: Runner, env: dict[str, str]) -> int:
    """Start the run again after the requeue exit code, and on a new slice after a preemption.

    The source code is that of the first start, even if files here are edited meanwhile.
    Returns the run's exit code: 0, or that of the host that failed first.
    """
    if not runner.go:
        _show_watch(options, runner)
        return 0
    restarts = silent = 0
    while True:
        time.sleep(options.poll)
        happened, reports = _look(options, runner)
        if happened == "failed":  # hosts of a slice being preempted fail one by one
            time.sleep(options.poll)
            happened, reports = _look(options, runner)
        if any(r.stopped for r in reports):
            runner.say("somebody asked this run to stop: not restarted")
            return 0
        silent = silent + 1 if happened == "silent" else 0
        if happened == "done":
            runner.say("\nall hosts are done; the slice is still billed until stop --delete")
            return 0
        if happened == "failed":
            _end_the_rest(options, runner, reports)
            logs(options, runner)
            return worst_first(reports)[0].code or 1
        if silent > MAX_SILENT_POLLS:
            raise LaunchError(f"{options.name} did not answer {silent} times: see status")
        if happened in ("requeue", "preempted", "lost"):
            restarts += 1
            if restarts > options.max_restarts:
                raise LaunchError(f"given up after {options.max_restarts} restarts ({happened})")
            runner.say(f"\n{happened}: restart {restarts} of at most {options.max_restarts}")
            if not _restart(options, runner, happened, env):
                return REQUEUE_EXIT_CODE


def _look(options: argparse.Namespace, runner: Runner) -> tuple[str, list[HostReport]]:
    """(what happened to the run or its slice, reports of the hosts)."""
    quiet = _Quiet(runner)
    state = quiet.run(_state_step(options, ""), capture=True).strip()
    if state in LEAVING + GONE:
        return "preempted" if state in GONE else "leaving", []
    step = Step("", ssh(options, host(options, "status")), may_fail=True)
    reports = parse_reports(quiet.run(step, capture=True))
    if len(reports) < num_hosts(options.accelerator):
        return "silent", reports
    return verdict(reports), reports


def _end_the_rest(options: argparse.Namespace, runner: Runner, reports: list[HostReport]) -> None:
    """Stop the other hosts: they would wait for the dead one, and be billed, forever."""
    if any(report.state == "running" for report in reports):
        remote = host(options, "stop", str(SECONDS_TO_DIE))
        runner.run(Step("a host failed: end the others", ssh(options, remote), may_fail=True))


def _restart(
    options: argparse.Namespace, runner: Runner, happened: str, env: dict[str, str]
) -> bool:
    if happened != "requeue":
        if not options.recreate:
            runner.say("the slice is gone or new: create, setup and run again, or use --recreate")
            return False
        if happened == "preempted":
            _delete(options, runner, "a preempted request does not come back: remove it")
            create(options, runner)
        _install(options, runner)
    _start(options, runner, env)
    return True


def _show_watch(options: argparse.Namespace, runner: Runner) -> None:
    runner.run(_state_step(options, f"then every {options.poll:g} s: is the slice there"))
    runner.run(Step("and what do the hosts say", ssh(options, host(options, "status"))))
    runner.say(f"\n# exit code {REQUEUE_EXIT_CODE}: the two commands above again")
    if options.recreate:
        runner.say("\n# preempted: delete, create, setup, run")
        _delete(options, runner, "a preempted request does not come back: remove it")
        create(options, runner)
        _install(options, runner)
