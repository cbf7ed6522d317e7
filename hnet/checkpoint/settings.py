"""Settings of checkpoints."""

from dataclasses import dataclass

from hnet.bounds import Count, Natural
from hnet.fields import check


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept."""

    every: Natural = 1000
    """number of updates per checkpoint; 0 = only at the end and at a stop request"""
    keep: Count = 3
    """number of newest good checkpoints kept; older ones are deleted once a new one is durable"""
    keep_every: Natural = 0
    """divisor of the steps whose checkpoints are never deleted; 0 = none"""
    asynchronous: bool = True
    """whether to write in the background while training continues"""
    cast_dtype: bool = False
    """whether a restore may cast to other dtypes than the saved ones"""
    timeout_seconds: Count = 1200
    """longest time in seconds for a save, and for waiting for another host in it"""

    def __post_init__(self):
        check(self, "checkpoint")
