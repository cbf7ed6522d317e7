"""The sections of a run's configuration beside the network, which can be read without JAX."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from hnet.data.config import DataConfig
from hnet.errors import ConfigError
from hnet.fields import Bounds, Count, Natural, NotNegative, Positive, Share, check

if TYPE_CHECKING:
    from hnet.config import HNetConfig


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    learning_rate: Positive = 1e-3
    """peak learning rate, before the multiplier of each stage"""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """after warm-up: constant then 1 - sqrt decay, cosine to 0, or constant"""
    warmup_frac: Share = 0.1
    """share of the steps that warm up linearly"""
    decay_frac: Share = 0.2
    """share of the steps, at the end, in which wsd decays"""
    lr_multipliers: Literal["published", "none"] | tuple[NotNegative, ...] = "published"
    """learning-rate factor of each stage, outermost first: the paper's formula, 1, or numbers"""
    b1: Annotated[float, Bounds(0, below=1)] = 0.9
    """decay of Adam's mean of gradients"""
    b2: Annotated[float, Bounds(0, below=1)] = 0.95
    """decay of Adam's mean of squared gradients"""
    eps: Positive = 1e-8
    """term that keeps Adam from dividing by 0"""
    weight_decay: NotNegative = 0.1
    """decoupled weight decay; not on norms, biases, A_log, dt_bias and D"""
    clip_norm: Positive = 1.0
    """global gradient norm above which gradients are scaled down"""

    def __post_init__(self):
        check(self, "optim")

    def multipliers(self, model: "HNetConfig") -> tuple[float, ...]:
        """Learning-rate multiplier of each stage of `model`."""
        match self.lr_multipliers:
            case "published":
                from hnet.config import lr_multipliers

                return lr_multipliers(model)
            case "none":
                return (1.0,) * len(model.stages)
            case explicit if len(explicit) == len(model.stages):
                return explicit
            case explicit:
                raise ConfigError(
                    f"optim.lr_multipliers={explicit} has {len(explicit)} numbers for "
                    f"{len(model.stages)} stages: give one a stage"
                )


@dataclass(frozen=True)
class ControllerConfig:
    """Holding the rate of stages with `hold_rate` (`hnet.chunking.controller`)."""

    hold_frac: Share = 0.3
    """share of the updates, the last ones, in which offsets move. Before them only the rate loss
    acts: it settles at more chunks than the target, with which a model learns faster at first"""
    gain: NotNegative = 1.0
    """how far an update moves an offset for a relative error of 1, that is at twice the target. It
    goes with the root of the learning rate's schedule: the less the router moves, the more batches
    are averaged"""
    settle_bytes: Natural = 1_000_000
    """positions of training text on which the offsets are set after the last update (at most as
    many batches as were trained on); 0 = leave them as the last update did"""
    fit_default: bool = False
    """the default route has no script of the text: fit its router, then its offset, on as much of
    it in made-up scripts (`hnet.train.default_route`), so that a script which was never trained on
    is cut at this route's target"""

    def __post_init__(self):
        check(self, "controller")

    def hold_from(self, num_steps: int) -> int:
        """Updates of a run before the first one in which offsets move."""
        return round((1 - self.hold_frac) * num_steps)


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run and what happens when numbers go wrong."""

    steps: Count = 1000
    """optimizer updates"""
    accumulate: Count = 1
    """micro-batches per update; the batch is divided into that many"""
    packed_rows: Count = 1
    """rows of a device whose chunks share a row of slots, so that one that cuts often takes what
    another leaves; as many of them as divide the rows of a device"""
    log_every: Count = 10
    """updates between two lines of metrics.jsonl"""
    max_skipped: Count = 10
    """updates in a row that may be skipped for a non-finite loss or gradient"""
    on_non_finite: Literal["rollback", "stop"] = "rollback"
    """after max_skipped: go back to the last good checkpoint with later data, or end"""
    stop_on_alarm: bool = False
    """end the run when a boundary alarm is raised"""

    def __post_init__(self):
        check(self, "train")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the held-out text while training."""

    every: Natural = 500
    """updates between two evaluations; 0 = only the last one, on the whole held-out text"""
    max_bytes: Count = 65_536
    """held-out bytes of the evaluations before the last one, which reads all"""
    probe_bytes: Count = 384
    """bytes of each text whose boundaries are drawn"""
    probe_texts: Count = 4
    """texts drawn of the held-out text and of each of probe_files, spread evenly"""
    probe_files: tuple[str, ...] = ()
    """files of texts with gold boundaries, as `experiments.boundaries` reads them"""

    def __post_init__(self):
        check(self, "eval")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved and how much of it is kept."""

    every: Natural = 1000
    """optimizer updates between two checkpoints; 0 = only at the end and at a stop request"""
    keep: Count = 3
    """newest good checkpoints kept; older ones are deleted after a new one is durable"""
    keep_every: Natural = 0
    """checkpoints of steps divisible by this are kept for ever; 0 = none"""
    asynchronous: bool = True
    """write in the background while training goes on"""
    cast_dtype: bool = False
    """allow a restore into other dtypes than the saved ones"""
    timeout_seconds: Count = 1200
    """the longest that a save, or a host that others wait for in it, may take"""

    def __post_init__(self):
        check(self, "checkpoint")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 on at most one of them means all that are left."""

    data: int = -1
    """copies of the parameters, each on its own rows"""
    fsdp: int = 1
    """rows too, with parameters and optimizer state sharded over the axis"""
    tensor: int = 1
    """attention heads, MLP and Mamba inner width sharded over the axis"""

    def __post_init__(self):
        check(self, "mesh")
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        if bad := [f"mesh.{k}={v}" for k, v in sizes.items() if v < 1 and v != -1]:
            raise ConfigError(
                f"{', '.join(bad)}: use 1 or more, or -1 for all devices that are left"
            )
        if len(free := [k for k, v in sizes.items() if v == -1]) > 1:
            raise ConfigError(f"mesh.{' and mesh.'.join(free)} are all -1: leave at most one open")


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of one run find each other; nothing to set on one machine."""

    coordinator: str | None = None
    """HOST:PORT of process 0; default: $JAX_COORDINATOR_ADDRESS, else found by `auto`"""
    num_processes: Count | None = None
    """processes of the run; default: $JAX_NUM_PROCESSES, else found by `auto`"""
    process_id: Natural | None = None
    """number of this process from 0; default: $JAX_PROCESS_ID, else found by `auto`"""
    auto: bool = True
    """ask the environment: TPU pods, GKE, Slurm, Open MPI"""
    initialization_timeout: Count = 300
    """seconds to wait for all processes at the start"""
    heartbeat_timeout_seconds: Count = 100
    """seconds of silence after which a process counts as dead"""
    shutdown_timeout_seconds: Count = 60
    """seconds a finished process waits for the others"""
    barrier_timeout_seconds: Positive = 600.0
    """seconds a process waits at a barrier before it names the missing ones"""

    def __post_init__(self):
        check(self, "distributed")


@dataclass(frozen=True)
class WatchdogConfig:
    """When silence counts as a hang."""

    timeout_seconds: NotNegative = 600.0
    """seconds without a heartbeat before the stacks are written; 0 = no watchdog"""
    kill_after_seconds: NotNegative = 0.0
    """seconds without a heartbeat before the process ends with the requeue code; 0 = never"""

    def __post_init__(self):
        check(self, "watchdog")
        if self.kill_after_seconds and not self.timeout_seconds:
            raise ConfigError("watchdog.timeout_seconds=0 turns watchdog.kill_after_seconds off")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace for TensorBoard's profile plugin."""

    steps: str = ""
    """FIRST:LAST, e.g. 10:20; empty = no trace"""

    def __post_init__(self):
        first, _, last = self.steps.partition(":")
        is_range = first.isdecimal() and last.isdecimal() and len(last) < 10
        if self.steps and not (is_range and int(first) < int(last)):
            raise ConfigError(f"profile.steps={self.steps!r}: write FIRST:LAST, e.g. 10:20")

    @property
    def range(self) -> tuple[int, int]:
        """(first step, step after the last one); (0, 0) for no trace."""
        first, _, last = self.steps.partition(":")
        return (int(first), int(last)) if self.steps else (0, 0)


@dataclass(frozen=True)
class Sections:
    """Everything a run is made of but its network."""

    workdir: str = "runs/default"
    """folder of this run, local or gs://bucket/folder; the same command again resumes in it"""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """number that the initialisation and the order of the data follow from"""
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    controller: ControllerConfig = ControllerConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    profile: ProfileConfig = ProfileConfig()
