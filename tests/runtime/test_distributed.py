"""Start-up, stop requests, barriers: one process, and two emulated ones."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from hnet.checkpoint.save import Checkpointer
from hnet.errors import ConfigError
from hnet.runtime import distributed
from hnet.runtime.stop_request import StopRequest
from hnet.train.config import DistributedConfig
from tpu import emulate
from tpu.emulate import Emulation

ROOT = Path(__file__).parents[2]
ENV = {"PYTHONPATH": str(ROOT)}
BOUND = 60  # seconds no emulation of these tests comes near


# --- one process


def test_one_process_needs_nothing(monkeypatch):
    for variable in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(variable, raising=False)
    distributed.initialize()
    distributed.initialize(DistributedConfig(coordinator="127.0.0.1:1", num_processes=1))
    assert (distributed.num_hosts(), distributed.host_id()) == (1, 0)
    assert distributed.exchange("x", "mine") == ["mine"]
    distributed.barrier("x")
    distributed.assert_same_on_all_hosts(distributed.host_facts({"a": 1}))
    distributed.leave(2)


@pytest.mark.parametrize(
    "settings, env, message",
    [
        ({"num_processes": 2, "process_id": 0, "auto": False}, {}, "distributed.coordinator is"),
        ({"auto": False}, {"JAX_PROCESS_ID": "0"}, "distributed.coordinator is not set: give it"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, r"\$JAX_NUM_PROCESSES='two' is not a number"),
        (
            {"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 2},
            {},
            "could not start",
        ),
    ],
)
def test_incomplete_settings_are_named(settings, env, message, monkeypatch):
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message) as e:
        distributed.initialize(DistributedConfig(**settings))
    assert "\n" not in str(e.value)


def test_start_that_waits_for_others_says_so(monkeypatch, caplog):
    def others_never_come(**settings):
        while not caplog.messages:
            time.sleep(0.01)
        raise RuntimeError("DEADLINE_EXCEEDED\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", others_never_come)
    config = DistributedConfig("127.0.0.1:1", 2, 1, initialization_timeout=1)
    with pytest.raises(ConfigError, match="could not start: RuntimeError: DEADLINE_EXCEEDED; give"):
        distributed.initialize(config)
    assert "num_processes=2, process_id=1): not all processes have joined" in caplog.text


def test_stop_request_of_one_process():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with StopRequest() as stop:
            assert not stop.stop_requested(1)
            signal.raise_signal(number)
            assert stop.stop_requested(2)
            assert stop.stop_requested(3)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    with StopRequest() as stop:
        stop.request("time limit")
        assert stop.stop_requested(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


PAUSES = """
import ctypes, signal, sys
from hnet.runtime.stop_request import StopRequest
with StopRequest() as stop:
    signal.siginterrupt(signal.SIGINT, False)  # a read that is interrupted goes on
    libc, byte = ctypes.CDLL(None), ctypes.create_string_buffer(1)
    read, stdin = libc.fread, ctypes.c_void_p.in_dll(libc, "stdin")
    print("compiling", file=sys.stderr, flush=True)
    # Like a compilation this runs no Python in the main thread, whatever signals come.
    read(byte, 1, 1, stdin)
    if stop.stop_requested(3):
        print("saved", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_is_answered_while_the_main_thread_runs_no_python(presses):
    """The first Ctrl-C is a request that the run follows when it can, the second ends it."""
    command = [sys.executable, "-c", PAUSES]
    with subprocess.Popen(
        command, env=os.environ | ENV, stderr=subprocess.PIPE, stdin=subprocess.PIPE
    ) as child:
        assert child.stderr.readline() == b"compiling\n"
        child.send_signal(signal.SIGINT)
        heard = child.stderr.readline()
        assert heard.startswith(b"Ctrl-C: the run saves and ends") and child.poll() is None
        if presses == 1:
            child.stdin.write(b".")
            child.stdin.flush()
            assert child.wait(BOUND) == 0 and child.stderr.read().endswith(b"saved\n")
        else:
            child.send_signal(signal.SIGINT)
            assert child.wait(BOUND) == 130
            assert child.stderr.read() == b"interrupted\n"


# --- two processes

TOGETHER = """
import sys, time
from pathlib import Path
import jax
from hnet.errors import ConfigError
from hnet.runtime import distributed
from hnet.checkpoint.save import Checkpointer
from hnet.runtime.stop_request import StopRequest
from hnet.train.config import WatchdogConfig
from hnet.train.watchdog import Watchdog
distributed.initialize()
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

me, workdir = distributed.host_id(), sys.argv[1]
for use in range(3):
    print("exchange", distributed.exchange("letters", f"{use}{'ab'[me]}"), flush=True)
distributed.assert_same_on_all_hosts(distributed.host_facts({"lr": 1}))
try:
    distributed.assert_same_on_all_hosts({"jax": "1", "config": "xy"[me]})
except ConfigError as e:
    print("differs:", e, flush=True)
watchdog = Watchdog(workdir, WatchdogConfig(timeout_seconds=0.4))
watchdog.beat("restore")
for _ in range(600):  # until the silence was noticed
    if list(Path(workdir).glob(f"hang-host{me}-*.txt")):
        break
    time.sleep(0.05)
if me == 0:
    try:
        distributed.barrier("restored", timeout_seconds=0.5)
    except distributed.BarrierTimeout as e:
        print("missing:", e, flush=True)
distributed.barrier("late ones", timeout_seconds=30)
watchdog.close()

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
state = {
    "step": jax.device_put(np.int32(0), everywhere),
    "w": jax.device_put(np.arange(24, dtype=np.float32).reshape(8, 3), split),
}
update = jax.jit(lambda s: {"step": s["step"] + 1, "w": s["w"] + 1}, donate_argnums=0)
with StopRequest() as stop, Checkpointer(workdir) as checkpoints:
    for step in range(1, 3000):
        state = update(state)
        if step == 5:
            checkpoints.save(step, state, {"host": me})
            print("training", flush=True)
        if stop.stop_requested(step):
            checkpoints.save(step, state, {"host": me})
            break
        time.sleep(0.01 * (1 + me))
    checkpoints.wait()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split
                            if x.ndim else everywhere), state)
    again = checkpoints.restore(abstract)
    print("again:", again.step == step, int(again.state["step"]) == step, flush=True)
print("saved", step, flush=True)
distributed.leave(distributed.REQUEUE_EXIT_CODE)
sys.exit(distributed.REQUEUE_EXIT_CODE)
"""


def test_two_hosts_agree_and_save_the_same_step(tmp_path):
    with Emulation([sys.executable, "-c", TOGETHER, str(tmp_path)], env=ENV) as hosts:
        hosts.wait_for("training", host=1, timeout=BOUND)
        hosts.signal(signal.SIGTERM, host=1)
        assert hosts.wait(BOUND) == [distributed.REQUEUE_EXIT_CODE] * 2, hosts.lines
        saved = {hosts.wait_for("saved", host) for host in (0, 1)}
        assert len(saved) == 1
        step = int(saved.pop().split()[1])
        assert 5 < step < 2999
        for host in (0, 1):
            exchanged = [line for line in hosts.lines[host] if line.startswith("exchange")]
            assert exchanged == [f"exchange ['{use}a', '{use}b']" for use in range(3)]
            differs = hosts.wait_for("differs:", host)
            assert "hosts differ in config: host 1 (" in differs and "has 'y'" in differs
            assert hosts.wait_for("again:", host) == "again: True True"
        missing = hosts.wait_for("missing:", 0)
        assert "'barrier/restored': 1 of 2 hosts did not come within 0.5 s: host 1 (" in missing
        assert "last phase restore" in missing
    for host in (0, 1):
        dump = next(tmp_path.glob(f"hang-host{host}-*.txt")).read_text()
        assert "last phase 'restore'" in dump and "MainThread" not in dump
        assert 'File "<string>"' in dump
    # What two processes wrote, one reads.
    with Checkpointer(tmp_path) as checkpoints:
        abstract = {"step": jax.ShapeDtypeStruct((), "int32")}
        abstract["w"] = jax.ShapeDtypeStruct((8, 3), "float32")
        restored = checkpoints.restore(abstract)
    assert (restored.step, restored.extras) == (step, {"host": 0})
    want = np.arange(24, dtype=np.float32).reshape(8, 3) + np.float32(step)
    np.testing.assert_array_equal(restored.state["w"], want)


ODD = """
import sys
from hnet.errors import ConfigError
from hnet.runtime import distributed
distributed.initialize()
print("joined", distributed.num_hosts(), flush=True)
try:
    if distributed.host_id() == 1:
        raise ConfigError("data.files: nothing here")
    try:
        distributed.barrier("loaded", timeout_seconds=2)
    except distributed.BarrierTimeout as e:
        print("missing:", e, flush=True)
        distributed.leave(1)
except ConfigError as e:
    print(e, file=sys.stderr)
    distributed.leave(2, str(e))
"""


def test_failed_host_keeps_its_code_and_is_named_in_a_slurm_step():
    port = emulate.free_port()
    slurm = {
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": str(port), "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
    }  # fmt: skip
    # Only Slurm's variables: those of the emulation are removed.
    shell = (
        "export SLURM_PROCID=$JAX_PROCESS_ID SLURM_LOCALID=$JAX_PROCESS_ID; "
        'unset JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID; exec "$@"'
    )
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", ODD]
    with Emulation(command, env=ENV | slurm) as hosts:
        assert hosts.wait(BOUND) == [1, 2], hosts.lines
        assert hosts.first_failure == (1, 2)
        assert hosts.lines[1][-2:] == ["joined 2", "data.files: nothing here"]
        assert "ended with 2 data.files: nothing here)" in hosts.wait_for("missing:", 0)


DEAD = """
import os, sys, time
import jax
from hnet.command_line import run
from hnet.errors import ConfigError
from hnet.runtime import distributed, guard
from hnet.runtime.settings import DistributedConfig
from hnet.runtime.stop_request import StopRequest

def main():
    distributed.initialize(DistributedConfig(heartbeat_timeout_seconds=6))
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(np.ones(2, np.float32), NamedSharding(mesh, P("data")))
    total = jax.jit(lambda x: x + x.sum(), out_shardings=x.sharding)
    victim, how = int(sys.argv[1]), sys.argv[2]
    if how == "fails":
        guard.GRACE_SECONDS = 0.5
    distributed.barrier("ready")
    with StopRequest() as stop:
        for step in range(1, 1000):
            if step == 7 and how == "refuses":
                time.sleep(3 * (distributed.host_id() != victim))
                raise ConfigError("there is no such file")
            if step == 7 and distributed.host_id() == victim:
                time.sleep(2)  # a sign of life at step 6
                if how == "fails":
                    raise ValueError("no more")
                os.kill(os.getpid(), 9)
            x = jax.block_until_ready(total(x)) * np.float32(0)
            stop.stop_requested(step)

run(main)
"""


@pytest.mark.few(
    "victim, how, code", [(0, "dies", 137), (1, "fails", 1)],
    [(0, "dies", 137), (1, "dies", 137), (1, "fails", 1)],
)  # fmt: skip
def test_a_host_that_dies_or_fails_ends_the_others_with_a_line_that_names_it(victim, how, code):
    command = [sys.executable, "-c", DEAD, str(victim), how]
    with Emulation(command, devices=1, env=ENV) as hosts:
        codes = hosts.wait(BOUND, grace=BOUND)
        other = 1 - victim
        assert (codes[victim], codes[other]) == (code, 1), hosts.lines
        assert hosts.first_failure == (victim, code)
    own = [line for line in hosts.lines[other] if "coordination_service" not in line]
    ends = [line for line in own if line.startswith("error: ")]
    assert len(ends) == 1 and ends[0].startswith(f"error: host {victim} ("), "\n".join(own)
    assert {"dies": "died", "fails": "ended with 1 ValueError: no more"}[how] in ends[0]
    assert "this host was at step 6; start the same command on all hosts again" in ends[0]
    assert not any("stack trace" in line or "Traceback" in line for line in own), own


@pytest.mark.every
def test_a_host_that_refuses_later_than_host_0_keeps_its_own_code_and_line():
    with Emulation([sys.executable, "-c", DEAD, "0", "refuses"], devices=1, env=ENV) as hosts:
        assert hosts.wait(BOUND, grace=BOUND) == [2, 2], hosts.lines
    assert hosts.lines[1][-1] == "error: there is no such file"
