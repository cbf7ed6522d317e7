"""Settings of a run over several processes."""

from dataclasses import dataclass
from typing import Annotated

from hnet.bounds import Bounds, Count, Natural
from hnet.fields import check


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of one run find each other; not needed on one machine."""

    coordinator: str | None = None
    """address HOST:PORT of process 0; default: $JAX_COORDINATOR_ADDRESS, else found by `auto`"""
    num_processes: Count | None = None
    """number of processes; default: $JAX_NUM_PROCESSES, else found by `auto`"""
    process_id: Natural | None = None
    """index of this process, from 0; default: $JAX_PROCESS_ID, else found by `auto`"""
    auto: bool = True
    """whether to detect the processes from the environment: TPU pods, GKE, Slurm, Open MPI"""
    initialization_timeout: Count = 300
    """seconds to wait for all processes at the start"""
    heartbeat_timeout_seconds: Count = 100
    """seconds of silence after which a process counts as dead, which ends the others"""
    shutdown_timeout_seconds: Count = 60
    """seconds that a finished process waits for the others"""
    barrier_timeout_seconds: Annotated[float, Bounds(above=0, most=1e9)] = 600.0
    """seconds that a process waits at a barrier before it names the missing ones"""

    def __post_init__(self):
        check(self, "distributed")
