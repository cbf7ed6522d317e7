"""Slurm clusters with GPU nodes and a shared file system."""

import argparse
import re
import shlex
from pathlib import Path

from hnet.runtime.distributed import REQUEUE_EXIT_CODE
from tpu import bundle
from tpu.commands import HostReport, Runner, Step, check_word, parse_report, shell_line, worst_first

SECONDS_TO_SAVE = 300
KILLED = 137


def folder(options: argparse.Namespace) -> Path:
    return Path(options.home) / "runs" / options.name


def script(options: argparse.Namespace) -> str:
    """The batch script: one process per GPU, requeued if the first host to end asks for it.

    `srun` reports the highest exit code of the tasks, which after a kill is not the cause. So each
    task writes its own exit code and time next to its log (tpu/host.sh).
    """
    directives = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.gpus_per_node,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_gpu,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "output": folder(options) / "slurm-%j.log",
        "open-mode": "append",
        "signal": f"TERM@{SECONDS_TO_SAVE}",
    }
    head = [f"#SBATCH --{key}={value}" for key, value in directives.items() if value is not None]
    exports = {
        "HNET_HOME": options.home,
        "HNET_CODE_HASH": bundle.code_hash(),
        "HNET_CONFIG_HASH": bundle.config_hash(options.command),
        "HNET_STAGGER": str(options.stagger),
    }
    host = ["bash", f"{options.home}/code/tpu/host.sh", "exec", options.name, *options.command]
    return "\n".join(
        [
            "#!/bin/bash",
            *head,
            "#SBATCH --requeue",
            "set -u",
            *(f"export {key}={shlex.quote(value)}" for key, value in exports.items()),
            f"folder={shlex.quote(str(folder(options)))}",
            'rm -f "$folder"/host-*.exit',
            'srun --kill-on-bad-exit=1 --open-mode=append --output="$folder/host-%t.log" \\',
            f"  {shell_line(host)}",
            "code=$?",
            'first=$(cat "$folder"/host-*.exit 2>/dev/null | sort -k2,2n |',
            "  awk '$1 ~ /^[0-9]+$/ && $1 != 0 { print $1; exit }')",
            f'if [[ "${{first:-$code}}" == {REQUEUE_EXIT_CODE} && ! -e "$folder/stop" ]] &&',
            f"  ((${{SLURM_RESTART_COUNT:-0}} < {options.max_restarts})); then",
            '  exec scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "${first:-$code}"',
            "",
        ]
    )


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for options that this platform cannot use."""
    check_word("home", options.home)


# --- actions -------------------------------------------------------------------------------------


def create(options: argparse.Namespace, runner: Runner) -> None:
    runner.say("# nothing to create: Slurm gives nodes to a job when it runs")


def setup(options: argparse.Namespace, runner: Runner) -> None:
    archive = Path(options.state) / options.name / "code.tar.gz"
    runner.say(f"\n# pack the code, hash {bundle.code_hash()}: {archive}")
    if runner.go:
        bundle.write_bundle(archive)
    words = ["env", f"HNET_HOME={options.home}", "bash", str(bundle.ROOT / "tpu" / "setup.sh")]
    words += ["--accelerator", "cuda", "--bundle", str(archive)]
    runner.run(Step("install once, in the shared folder", tuple(words)))


def run(options: argparse.Namespace, runner: Runner) -> None:
    file = Path(options.state) / options.name / "job.sbatch"
    runner.write(file, script(options), "the batch script")
    if runner.go:
        folder(options).mkdir(parents=True, exist_ok=True)
        (folder(options) / "stop").unlink(missing_ok=True)
    why = "submit; the job requeues itself on exit code 75 and after preemption"
    runner.run(Step(why, ("sbatch", str(file)), costs=True))


def status(options: argparse.Namespace, runner: Runner) -> None:
    form = "--format=%i %T %M %R"
    runner.run(Step("in the queue", ("squeue", f"--name={options.name}", form), may_fail=True))
    words = ("sacct", f"--name={options.name}", "--format=JobID,State,ExitCode,Elapsed")
    runner.run(Step("finished", words, may_fail=True))
    for report, _ in _host_logs(options):
        runner.say(str(report))


def _host_logs(options: argparse.Namespace):
    """(report, log file) per task of the last start, the first to fail on top."""
    found = {}
    for log in folder(options).glob("host-*.log"):
        if number := re.fullmatch(r"host-(\d{1,6})", log.stem):
            found[_task(int(number[1]), log.with_suffix(".exit"))] = log
    return [(report, found[report]) for report in worst_first(list(found))]


def _task(number: int, end: Path) -> HostReport:
    """The report in the file that a task writes at its end; a damaged file means it was killed."""
    if not end.exists():
        return HostReport(number, "task", "running")
    code, _, at = end.read_text(errors="replace").strip().partition(" ")
    line = f"HNET host={number} name=task state=ended code={code} at={at}"
    return parse_report(line) or HostReport(number, "task", "ended", KILLED, end.stat().st_mtime)


def logs(options: argparse.Namespace, runner: Runner) -> None:
    runner.say(f"# the end of {folder(options)}/host-*.log, the first to fail on top")
    if not runner.go:
        return
    for report, file in _host_logs(options):
        text = file.read_text(errors="replace").splitlines()[-options.lines :]
        runner.say(f"\n==== {report}\n" + "\n".join(text))


def stop(options: argparse.Namespace, runner: Runner) -> None:
    runner.say(f"\n# mark it as stopped, so that it is not requeued: {folder(options)}/stop")
    if runner.go:
        folder(options).mkdir(parents=True, exist_ok=True)
        (folder(options) / "stop").touch()
    words = ("scancel", "--signal=TERM", f"--name={options.name}")
    runner.run(Step("ask every process to save and end", words, may_fail=True))
    if options.delete:
        words = ("scancel", f"--name={options.name}")
        runner.run(Step("cancel what is left, also in the queue", words, may_fail=True))
