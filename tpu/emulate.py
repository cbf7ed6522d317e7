"""Emulates N hosts with M devices each on one machine, to run the code path of a pod without one.

    python -m tpu.emulate --hosts 2 --devices 2 -- python -m experiments.pretrain --workdir DIR

starts the command N times as the processes of one run (CPU, gloo, loopback) and prefixes each line
of output with its host. SIGTERM is passed on; when this program ends, its children end too. The
exit code is that of the first host that failed, 124 after ``--timeout``.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from hnet.command_line import OneLineParser, file_path, number, run
from hnet.errors import ConfigError
from hnet.outputs import local_folder
from hnet.printable import printable

TIMEOUT_EXIT_CODE = 124
_DEVICE_FLAG = "--xla_force_host_platform_device_count"


def host_environment(host: int, hosts: int, devices: int, port: int) -> dict[str, str]:
    """Environment variables for one emulated host; see ``hnet.runtime.distributed``."""
    flags = re.sub(rf"{_DEVICE_FLAG}=\S+", "", os.environ.get("XLA_FLAGS", ""))
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} {_DEVICE_FLAG}={devices}".strip(),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(hosts),
        "JAX_PROCESS_ID": str(host),
        "PYTHONUNBUFFERED": "1",
    }


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Emulation:
    """The running hosts; leaving the context ends all of them and everything they started."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        hosts: int = 2,
        devices: int = 2,
        echo: IO[str] | None = None,
        log_dir: str | os.PathLike | None = None,
        env: dict[str, str] | None = None,
    ):
        """Start ``command`` on every host.

        ``echo`` receives each line prefixed with its host; the unchanged lines are appended to
        ``log_dir/host<i>.log``. Raises OSError if the command cannot be started.
        """
        port = free_port()
        self.lines: list[list[str]] = [[] for _ in range(hosts)]
        self._echo, self._changed = echo, threading.Condition()
        self._logs = [_open_log(log_dir, host) for host in range(hosts)]
        self.processes: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        try:
            for host in range(hosts):
                self._start(host, command, host_environment(host, hosts, devices, port), env or {})
        except OSError:
            self.kill()
            raise

    def _start(self, host: int, command: Sequence[str], *environments: dict[str, str]) -> None:
        environment = dict(os.environ)
        for more in environments:
            environment.update(more)
        process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that its children can be ended with it
        )
        self.processes.append(process)
        reader = threading.Thread(target=self._read, args=(host, process.stdout), daemon=True)
        reader.start()
        self._readers.append(reader)

    def _read(self, host: int, stream: IO[str]) -> None:
        for line in stream:
            with self._changed:
                self.lines[host].append(line.rstrip("\n"))
                self._changed.notify_all()
                if self._logs[host]:
                    self._logs[host].write(line)
                    self._logs[host].flush()
                if self._echo:
                    print(f"[host {host}] {line}", end="", file=self._echo, flush=True)

    def __enter__(self) -> "Emulation":
        return self

    def __exit__(self, *exc_info) -> None:
        self.kill()

    def wait_for(self, text: str, host: int, timeout: float = 60.0) -> str:
        """The first line of ``host`` containing ``text``. Raises TimeoutError with the output."""
        deadline = time.monotonic() + timeout
        while True:
            with self._changed:
                found = next((line for line in self.lines[host] if text in line), None)
                ended = self._poll_host(self.processes[host]) is not None
                if found is None and not ended and time.monotonic() < deadline:
                    self._changed.wait(0.2)
                    continue
            if found is None and ended and self._readers[host].is_alive():
                self._readers[host].join(1.0)
                continue
            if found is None:
                tail = "\n".join(self.lines[host][-20:])
                raise TimeoutError(f"host {host} never said {text!r}; its last lines:\n{tail}")
            return found

    def signal(self, number: int, host: int | None = None) -> None:
        """Send a signal to one host, or to all."""
        for process in self.processes if host is None else [self.processes[host]]:
            if self._poll_host(process) is None:
                process.send_signal(number)

    def wait(self, timeout: float, grace: float = 15.0) -> list[int]:
        """Exit codes of all hosts, in the shell's convention (128 + n after signal n).

        When one host fails, the others get ``grace`` seconds to end, then SIGTERM, then SIGKILL.
        Raises TimeoutError after ``timeout`` seconds; ``first_failure`` is the host that failed
        first.
        """
        deadline = time.monotonic() + timeout
        failed_at = None
        while (codes := self._poll()) and None in codes:
            now = time.monotonic()
            if failed_at is None and self.first_failure is not None:
                failed_at = now
            if now > deadline:
                raise TimeoutError(f"hosts {_missing(codes)} still run after {timeout:g} s")
            if failed_at is not None and now > failed_at + grace:
                self._end_others()
            time.sleep(0.05)
        for reader in self._readers:
            reader.join(5.0)
        return [c for c in codes if c is not None]

    first_failure: tuple[int, int] | None = None
    """(host, exit code) of the host that failed first"""

    def _poll(self) -> list[int | None]:
        codes = [self._poll_host(process) for process in self.processes]
        codes = [128 - c if c is not None and c < 0 else c for c in codes]
        if self.first_failure is None:
            bad = [(host, code) for host, code in enumerate(codes) if code]
            self.first_failure = bad[0] if bad else None
        return codes

    @staticmethod
    def _poll_host(process: subprocess.Popen) -> int | None:
        running = process.returncode is None
        code = process.poll()
        if running and code is not None:
            _kill_group(process)  # now: a freed process id may be reused
        return code

    def _end_others(self) -> None:
        self.signal(signal.SIGTERM)
        end = time.monotonic() + 5.0
        while time.monotonic() < end and None in self._poll():
            time.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """End every host and its descendants now."""
        for process in self.processes:
            if process.returncode is None:
                _kill_group(process)
        for process, reader in zip(self.processes, self._readers):
            process.wait()
            reader.join(5.0)
            if not reader.is_alive():  # else a process that left the group holds the pipe
                process.stdout.close()
        for log in self._logs:
            if log:
                log.close()


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # the group has ended
        pass


def _missing(codes: list[int | None]) -> str:
    return ", ".join(str(host) for host, code in enumerate(codes) if code is None)


def _open_log(log_dir: str | os.PathLike | None, host: int) -> IO[str] | None:
    if log_dir is None:
        return None
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    return open(Path(log_dir) / f"host{host}.log", "a", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        emulation = Emulation(
            options.command,
            hosts=options.hosts,
            devices=options.devices,
            echo=sys.stdout,
            log_dir=options.log_dir,
        )
    except OSError as e:
        command = printable(options.command[0])
        raise ConfigError(f"command {command!r} cannot be started: {e.strerror}") from None
    target = None if options.signal_host == "all" else int(options.signal_host)
    presses = 0

    def on_signal(number, frame):
        nonlocal presses
        presses += number == signal.SIGINT
        if presses > 1:
            raise KeyboardInterrupt
        emulation.signal(signal.SIGTERM, target)

    with emulation:
        old = {n: signal.signal(n, on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            emulation.wait(options.timeout, options.grace)
        except TimeoutError as e:
            print(f"emulation: {e}", file=sys.stderr)
            return TIMEOUT_EXIT_CODE
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
    if emulation.first_failure is None:
        return 0
    host, code = emulation.first_failure
    print(f"emulation: host {host} was the first to fail, exit code {code}", file=sys.stderr)
    return code


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m tpu.emulate", description=__doc__)
    few, seconds = number(int, 1, 1024), number(float, 0, 1e7)
    parser.add_argument("--hosts", type=few, default=2, help="processes (default 2)")
    parser.add_argument("--devices", type=few, default=2, help="CPU devices each (default 2)")
    parser.add_argument(
        "--timeout", type=seconds, default=3600, help="seconds for all (default 3600)"
    )
    parser.add_argument(
        "--grace", type=seconds, default=15, help="seconds for the others after a failure"
    )
    parser.add_argument("--signal-host", default="all", help="who gets a SIGTERM: all, or a number")
    parser.add_argument(
        "--log-dir", type=file_path, help="also write the output of each host to DIR/host<i>.log"
    )
    parser.add_argument("command", nargs="+", metavar="-- COMMAND")
    options = parser.parse_args(arguments)
    wanted = [*map(str, range(options.hosts)), "all"]
    if options.signal_host not in wanted:
        parser.error(f"--signal-host {options.signal_host}: use one of {', '.join(wanted)}")
    if options.log_dir is not None:
        local_folder(options.log_dir, "log-dir")
    return options


if __name__ == "__main__":
    run(main)
