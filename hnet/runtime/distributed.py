"""Several processes as one run: start-up, barriers that name missing hosts.

All communication here uses the coordination service that ``jax.distributed`` starts on process 0,
never the devices: a device collective has no timeout and cannot name the process that is late.
With one process every function is local.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax._src import distributed as jax_distributed  # the only access to the key-value store

import hnet
from hnet.errors import ConfigError, Failed, first_line
from hnet.runtime.guard import POLL_SECONDS, Guard, name_the_end
from hnet.runtime.settings import DistributedConfig

log = logging.getLogger(__name__)

REQUEUE_EXIT_CODE = 75
"""Exit code (EX_TEMPFAIL) of a run that was stopped and saved: start the same command again.

Other codes: 0 done, 2 bad input, anything else a failure.
"""


_barrier_timeout = DistributedConfig.barrier_timeout_seconds
_guard: Guard | None = None


class BarrierTimeout(Failed):
    """Hosts did not reach a barrier; the message is one line with its name and theirs."""


def initialize(config: DistributedConfig = DistributedConfig()) -> None:
    """Join the run. Call it first in a program: before any array, device or mesh is made.

    It does nothing if this is the only process or the run was joined already. Raises ConfigError
    for settings that are incomplete or contradict each other. If the other processes do not join
    in time, JAX aborts this one; a warning is logged after 80 % of that time.
    """
    global _barrier_timeout, _guard
    _barrier_timeout = config.barrier_timeout_seconds
    if jax.distributed.is_initialized():
        return
    given = {
        "coordinator": config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _number(config.num_processes, "JAX_NUM_PROCESSES"),
        "process_id": _number(config.process_id, "JAX_PROCESS_ID"),
    }
    missing = [name for name, value in given.items() if value is None]
    if given["num_processes"] == 1 or (len(missing) == 3 and not config.auto):
        return
    if missing and not config.auto:
        raise ConfigError(f"distributed.{missing[0]} is not set: give it")
    what = ", ".join(f"{k}={v}" for k, v in given.items() if v is not None) or "auto"
    hint = f"distributed ({what}): not all processes have joined; look for one that did not start"
    alarm = threading.Timer(0.8 * config.initialization_timeout, log.warning, (hint,))
    alarm.start()
    silence = config.heartbeat_timeout_seconds
    try:
        with name_the_end(jax_distributed._jax, lambda: _guard):
            jax.distributed.initialize(
                coordinator_address=given["coordinator"],
                num_processes=given["num_processes"],
                process_id=given["process_id"],
                cluster_detection_method=None if missing else "deactivate",
                initialization_timeout=config.initialization_timeout,
                heartbeat_timeout_seconds=2 * silence + 10,  # `Guard` comes first
                shutdown_timeout_seconds=config.shutdown_timeout_seconds,
            )
    except (ValueError, RuntimeError, OSError) as e:
        # No cluster, or JAX has already computed in this interpreter (a notebook, a test).
        one_process = ("coordinator_address should be defined", "must be called before")
        if len(missing) == 3 and any(text in str(e) for text in one_process):
            return
        raise ConfigError(
            f"distributed ({what}) could not start: {first_line(e)}; give all of coordinator, "
            "num_processes and process_id, or set distributed.auto False for one process"
        ) from None
    finally:
        alarm.cancel()
    _client().key_value_set(f"hnet/host/{host_id()}", socket.gethostname())
    if num_hosts() > 1:
        address = jax_distributed.global_state.coordinator_address
        _guard = Guard(_client(), address, host_id(), silence, _describe_host)


def _number(value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is None and text and not text.isdecimal():
        raise ConfigError(f"${variable}={text!r} is not a number: give the one of this run")
    return int(text) if value is None and text else value


def leave(exit_code: int, reason: str = "") -> None:
    """Last call of a program that is about to end with ``exit_code``.

    A host that is done (0 or REQUEUE_EXIT_CODE) waits for the others. A host that failed publishes
    ``reason`` and ends its process here. Otherwise JAX would make it wait for the hosts that wait
    for it, then abort.
    """
    if num_hosts() == 1:
        return
    if _guard:
        _guard.own_code = exit_code
    if exit_code in (0, REQUEUE_EXIT_CODE):
        if _guard:
            _guard.close()
        jax.distributed.shutdown()
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # host 0 may have ended already
        _client().key_value_set(f"hnet/failed/{host_id()}", f"{exit_code} {reason}".strip())
    sys.stdout.flush()
    sys.stderr.flush()
    if host_id() == 0:  # the others read the reason from this process
        time.sleep(2 * POLL_SECONDS)
    os._exit(exit_code)


def wait_for_dead_host(error: Exception) -> None:
    """For an error of a collective that another host's death may have caused: wait until this is
    noticed, which ends this process with a line that names the host. Returns for other errors."""
    is_of_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError)  # gloo's: ValueError
    if _guard and is_of_jax and _LOST.match(str(error)):
        _guard.wait_for_end()


_LOST = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|UNKNOWN: Gloo|.*Gloo .* failed")


def note_step(step: int) -> None:
    """Note the step that this host is at, for the line that it ends with if another is lost."""
    if _guard:
        _guard.step = step


def _client():
    return jax_distributed.global_state.client


def num_hosts() -> int:
    """Number of processes. Unlike ``jax.process_count`` it does not initialise the devices."""
    return jax_distributed.global_state.num_processes


def host_id() -> int:
    """Index of this process, from 0; process 0 writes the files."""
    return jax_distributed.global_state.process_id


def publish_phase(phase: str) -> None:
    """Publish what this process is doing, for the message of a barrier that times out."""
    if num_hosts() > 1:
        _client().key_value_set(f"hnet/phase/{host_id()}", phase, allow_overwrite=True)


def _describe_host(process: int) -> str:
    known = []
    for key, prefix in (("host", ""), ("phase", "last phase "), ("failed", "ended with ")):
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the key was never written
            known.append(prefix + _client().key_value_try_get(f"hnet/{key}/{process}"))
    return f"host {process}" + (f" ({', '.join(known)})" if known else "")


# Uses of each barrier name so far; equal on all hosts, because they run the same program.
_uses: Counter[str] = Counter()


def exchange(name: str, value: str, timeout_seconds: float | None = None) -> list[str]:
    """Every host's ``value`` for this ``name``, in the order of the processes.

    All hosts must call it with the same name; it acts as a barrier. Raises BarrierTimeout naming
    the hosts that did not call it within ``timeout_seconds`` (default:
    distributed.barrier_timeout_seconds).
    """
    if num_hosts() == 1:
        return [value]
    timeout = _barrier_timeout if timeout_seconds is None else timeout_seconds
    client, me, use = _client(), host_id(), _uses[name]
    _uses[name] += 1
    if use >= 2:  # a host at use n has read all values of use n - 2
        client.key_value_delete(f"hnet/exchange/{name}/{use - 2}/{me}")
    folder = f"hnet/exchange/{name}/{use}/"
    client.key_value_set(f"{folder}{me}", value)
    try:
        client.wait_at_barrier(f"hnet/{name}/{use}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as e:
        raise BarrierTimeout(_barrier_message(name, folder, timeout, e)) from None
    return [client.blocking_key_value_get(f"{folder}{p}", 10_000) for p in range(num_hosts())]


def _barrier_message(name: str, folder: str, timeout: float, error: Exception) -> str:
    try:
        came = {int(key.rsplit("/", 1)[1]) for key, _ in _client().key_value_dir_get(folder)}
    except jax.errors.JaxRuntimeError:  # the service itself has ended
        return f"barrier {name!r}: host 0 does not answer ({first_line(error)})"
    missing = [p for p in range(num_hosts()) if p not in came]
    if not missing:
        return f"barrier {name!r} failed with all hosts present: {first_line(error)}"
    return (
        f"barrier {name!r}: {len(missing)} of {num_hosts()} hosts did not come within "
        f"{timeout:g} s: " + ", ".join(_describe_host(p) for p in missing[:8])
    )


def on_first_host(name: str, action: Callable[[], Any]) -> Any:
    """Run `action` on host 0 and return its result (plain JSON) on every host.

    Used to write the files of the whole run. A ConfigError or Failed that `action` raises is raised
    on all hosts.
    """
    if num_hosts() == 1:
        return action()
    answer: dict[str, Any] = {}
    if host_id() == 0:
        try:
            answer["value"] = action()
        except (ConfigError, Failed) as e:
            answer["refused" if isinstance(e, ConfigError) else "failed"] = str(e)
    answer = json.loads(exchange(f"first/{name}", json.dumps(answer))[0])
    if "refused" in answer:
        raise ConfigError(answer["refused"])
    if "failed" in answer:
        raise Failed(answer["failed"])
    return answer["value"]


def barrier(name: str, timeout_seconds: float | None = None) -> None:
    """Wait until every host called this with ``name``. Raises BarrierTimeout like ``exchange``."""
    exchange(f"barrier/{name}", "", timeout_seconds)


def host_facts(config: Any) -> dict[str, str]:
    """Values that must be equal on all hosts: code, configuration (JSON), libraries, devices."""
    source = hashlib.sha256()
    for path in sorted(Path(hnet.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return {
        "code": source.hexdigest()[:16],
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
    }


def assert_same_on_all_hosts(values: dict[str, str], timeout_seconds: float | None = None) -> None:
    """Compare ``values`` across hosts. Raises ConfigError naming the host and entry that differ."""
    everyone = [json.loads(v) for v in exchange("same", json.dumps(values), timeout_seconds)]
    for name in values:
        seen = [host.get(name) for host in everyone]
        usual = Counter(seen).most_common(1)[0][0]  # a tie goes to the lower process number
        odd = [p for p, value in enumerate(seen) if value != usual]
        if odd:
            raise ConfigError(
                f"hosts differ in {name}: {_describe_host(odd[0])} has {seen[odd[0]]!r}, "
                f"{len(seen) - len(odd)} of {len(seen)} have {usual!r}: make them equal"
            )
