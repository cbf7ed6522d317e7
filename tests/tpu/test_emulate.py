"""The launcher of emulated hosts: environment, output, signals, time limits, clean-up."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hnet.command_line import exit_code
from tpu import emulate
from tpu.emulate import Emulation

ROOT = Path(__file__).parents[2]
BOUND = 60  # seconds no emulation of these tests comes near


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_emulation_environment_and_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--keep --xla_force_host_platform_device_count=8")
    echo = io.StringIO()
    code = "import os; e = os.environ; print(e['JAX_PROCESS_ID'], e['XLA_FLAGS'], flush=True)"
    (tmp_path / "host0.log").write_text("before\n")
    with Emulation(python(code), hosts=2, devices=3, echo=echo, log_dir=tmp_path) as hosts:
        assert hosts.wait(BOUND) == [0, 0]
    flags = "--keep  --xla_force_host_platform_device_count=3"
    assert hosts.lines == [[f"0 {flags}"], [f"1 {flags}"]]
    assert sorted(echo.getvalue().splitlines()) == [f"[host {h}] {h} {flags}" for h in (0, 1)]
    assert (tmp_path / "host0.log").read_text() == f"before\n0 {flags}\n"


def test_first_failure_ends_the_others_and_their_children(tmp_path):
    code = (
        "import os, subprocess, sys, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1': sys.exit(3)\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(99)'])\n"
        "print('child', child.pid, flush=True)\n"
        "time.sleep(99)\n"
    )
    with Emulation(python(code)) as hosts:
        child = int(hosts.wait_for("child", host=0).split()[1])
        assert hosts.wait(BOUND, grace=0.2) == [128 + signal.SIGTERM, 3]
        assert hosts.first_failure == (1, 3)
    assert_gone(child)


def assert_gone(pid: int) -> None:
    """Soon the process is gone, or is a zombie that waits to be collected."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")


def test_emulation_is_bounded(capsys):
    assert emulate.main(["--timeout", "0.3", "--", *python("import time; time.sleep(99)")]) == 124
    assert "hosts 0, 1 still run after 0.3 s" in capsys.readouterr().err


def test_emulation_passes_sigterm_to_one_host():
    code = (
        "import os, signal, sys, time\n"
        "me = os.environ['JAX_PROCESS_ID']\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('got', me, flush=True), sys.exit(75)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(1.5 if me == '0' else 99)\n"
    )
    command = [sys.executable, "-m", "tpu.emulate", "--signal-host", "1", "--grace", "9", "--"]
    with subprocess.Popen(
        command + python(code), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as launcher:
        ready = {launcher.stdout.readline() for _ in range(2)}
        assert ready == {"[host 0] ready\n", "[host 1] ready\n"}
        launcher.terminate()
        out, err = launcher.communicate(timeout=BOUND)
    assert launcher.returncode == 75
    assert out == "[host 1] got 1\n"
    assert "host 1 was the first to fail, exit code 75" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--hosts", "0", "--", "true"],
            "--hosts: '0': use a whole number from 1 to 1024",
        ),
        (["--signal-host", "2", "--", "true"], "--signal-host 2: use one of 0, 1, all"),
        (["--", "no-such-program"], "'no-such-program' cannot be started: No such file"),
    ],
)
def test_emulation_of_bad_input(arguments, message, capsys):
    assert exit_code(lambda: emulate.main(arguments))[0] == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
