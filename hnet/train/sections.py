"""The sections of a run's configuration except the model; importing them loads no JAX."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from hnet.bounds import Bounds, Count, FilePath, Natural, NotNegative, Positive, Seconds, Share
from hnet.checkpoint.settings import CheckpointConfig
from hnet.data.config import DataConfig
from hnet.errors import ConfigError, shown
from hnet.fields import check
from hnet.runtime.settings import DistributedConfig

if TYPE_CHECKING:
    from hnet.config import HNetConfig


@dataclass(frozen=True)
class InitConfig:
    """Weights that a new run starts from (`hnet.train.initial`), and which of them stay frozen.

    Modules are named as in official checkpoints, the word "backbone" may be left out: `embeddings`,
    `encoder`, `routing_module`, `main_network.encoder`, `lm_head`. A pattern is such a name, for
    all parameters below it, and may contain * and ?.
    """

    from_: str = ""
    """work directory of a run (its newest checkpoint, or that of a step: WORKDIR@STEP or
    WORKDIR/checkpoints/STEP), or official weights (.pt, .safetensors, .npz) with their JSON beside
    them; empty = random. The architecture is theirs unless NAME or model fields are given"""
    map: tuple[str, ...] = ()
    """pairs NEW=OLD: parameters below NEW are copied from those below OLD, to each route if NEW has
    several; =OLD leaves OLD out. Without a pair a parameter is copied from its own name"""
    new: tuple[str, ...] = ()
    """patterns of parameters that keep their random initialisation"""
    freeze: tuple[str, ...] = ()
    """patterns of parameters that training leaves as they are, without optimizer state"""
    ema: bool = False
    """whether to start from the moving average of the parameters that a run kept"""

    def __post_init__(self):
        check(self, "init")
        if bad := [pair for pair in self.map if pair.count("=") != 1 or pair.endswith("=")]:
            raise ConfigError(f"init.map={shown(bad[0])}: write NEW=OLD, or =OLD to leave OLD out")
        if not self.from_ and (given := [n for n in ("ema", "map", "new") if getattr(self, n)]):
            raise ConfigError(f"init.{given[0]} is given without init.from: say where weights are")


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """update of matrices (the weights of linear layers, without embeddings and head): AdamW, or
    Muon with the size of an AdamW update; all other parameters have AdamW"""
    learning_rate: Annotated[float, Bounds(above=0, most=1000)] = 1e-3
    """peak learning rate, before the multiplier of each stage"""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """schedule after warm-up: constant then 1 - sqrt decay, cosine to 0, or constant"""
    warmup_frac: Share = 0.1
    """fraction of the steps with linear warm-up"""
    decay_frac: Share = 0.2
    """fraction of the steps, at the end, in which wsd decays"""
    lr_multipliers: Literal["published", "none"] | tuple[NotNegative, ...] = "published"
    """learning-rate factor of each stage, outermost first: the paper's formula, 1, or numbers"""
    b1: Annotated[float, Bounds(0, below=1)] = 0.9
    """decay rate of Adam's mean of gradients"""
    b2: Annotated[float, Bounds(0, below=1)] = 0.95
    """decay rate of Adam's mean of squared gradients"""
    eps: Positive = 1e-8
    """term in Adam's denominator that prevents division by 0"""
    weight_decay: Annotated[float, Bounds(0, 1000)] = 0.1
    """decoupled weight decay; not on norms, biases, A_log, dt_bias and D"""
    clip_norm: Positive = 1.0
    """global gradient norm above which gradients are scaled down"""
    momentum: Annotated[float, Bounds(0, below=1)] = 0.95
    """decay rate of Muon's mean of gradients"""
    ema_decay: Annotated[float, Bounds(0, below=1)] = 0.0
    """decay rate per update of a moving average of the parameters, saved beside them; it rises to
    this value over the first updates; 0 = no average"""

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
                    f"{len(model.stages)} stages: give one per stage"
                )


@dataclass(frozen=True)
class RateControlConfig:
    """Control of the boundary rate in stages with `hold_rate` (`hnet.chunking.rate_control`)."""

    hold_frac: Share = 0.3
    """fraction of the updates, at the end, in which offsets move. Before that only the rate loss
    acts: it converges to more chunks than the target, with which a model learns faster at first"""
    gain: Annotated[float, Bounds(0, 1000)] = 1.0
    """change of an offset per update at a relative error of 1, that is at twice the target rate. It
    is multiplied by the square root of the learning-rate factor: the slower the predictor changes,
    the more batches are averaged"""
    offset_bytes: Natural = 1_000_000
    """number of positions of training text on which the offsets are set after the last update (at
    most as many batches as the run has updates); 0 = leave them as they are"""
    fit_default: bool = False
    """whether to fit the default route's predictor, then its offset, on offset_bytes positions of
    training text rewritten in synthetic scripts (`hnet.train.default_route`), so that unseen
    scripts are chunked at this route's target; for training text with no script of this route"""
    start_ratios: tuple[Annotated[float, Bounds(1, 1e6)], ...] = ()
    """target ratio of each stage at the first update; from there the target moves linearly to the
    stage's own; empty = it is constant"""
    ramp_frac: Share = 1.0
    """fraction of the updates, at the start, in which targets move"""

    def __post_init__(self):
        check(self, "rate_control")

    def hold_from(self, num_steps: int) -> int:
        """Number of updates before the first one in which offsets move."""
        return round((1 - self.hold_frac) * num_steps)


@dataclass(frozen=True)
class TrainConfig:
    """Length of a run, batching, and handling of non-finite numbers."""

    steps: Count = 1000
    """number of optimizer updates"""
    accumulate: Count = 1
    """number of micro-batches per update; the batch is divided into that many"""
    rows_sharing_slots: Count = 1
    """number of rows of a device whose chunks share a row of slots, so that a row with many chunks
    uses slots that others leave free; reduced to a divisor of the rows per device"""
    log_every: Count = 10
    """number of updates per line of metrics.jsonl"""
    max_skipped: Count = 10
    """number of consecutive skipped updates (non-finite loss or gradient) before on_non_finite"""
    on_non_finite: Literal["rollback", "stop"] = "rollback"
    """action after max_skipped: go back to the last good checkpoint with later data, or end"""
    stop_on_alarm: bool = False
    """whether a boundary alarm ends the run"""
    log_norms: bool = False
    """whether to log the norms of gradient and update of each part of the network"""
    log_groups: bool = False
    """whether to log bits per byte of the batch for each source and each script"""
    spike_deviations: NotNegative = 0.0
    """number of standard deviations above its running mean at which the loss or the gradient norm
    is a spike, whose update is skipped (6 is usual); 0 = no update is"""
    spike_window: Annotated[int, Bounds(10, 100_000)] = 100
    """number of updates over which mean and deviation are taken; none is skipped before"""

    def __post_init__(self):
        check(self, "train")
        if 0 < self.spike_deviations < 2:
            raise ConfigError(
                f"train.spike_deviations={self.spike_deviations}: use 2 or more, or 0 for no rule"
            )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text during training."""

    every: Natural = 500
    """number of updates per evaluation; 0 = only the last one, on the whole held-out text"""
    max_bytes: Count = 65_536
    """number of held-out bytes per evaluation, except the last one, which reads all"""
    probe_bytes: Count = 384
    """number of bytes of each text whose boundaries are drawn"""
    probe_texts: Count = 4
    """number of texts drawn from the held-out text and from each of probe_files, evenly spaced"""
    probe_files: tuple[str, ...] = ()
    """files of texts with gold boundaries, as `experiments.boundaries` reads them"""
    ema: bool = False
    """whether to evaluate the moving average of the parameters (optim.ema_decay)"""

    def __post_init__(self):
        check(self, "eval")


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; -1 (on at most one axis) means all remaining devices."""

    data: int = -1
    """number of copies of the parameters, each for its own rows"""
    fsdp: int = 1
    """number of shards of parameters and optimizer state; rows are sharded over this axis too"""
    tensor: int = 1
    """number of shards of attention heads and of the inner width of MLP and Mamba"""

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
class WatchdogConfig:
    """When a run without a heartbeat counts as hanging."""

    timeout_seconds: Seconds = 600.0
    """seconds without a heartbeat before the stacks are written; 0 = no watchdog"""
    kill_after_seconds: Seconds = 0.0
    """seconds without a heartbeat before the process ends with the requeue code; 0 = never"""

    def __post_init__(self):
        check(self, "watchdog")
        if self.kill_after_seconds and not self.timeout_seconds:
            raise ConfigError("watchdog.timeout_seconds=0 turns watchdog.kill_after_seconds off")


@dataclass(frozen=True)
class ProfileConfig:
    """A trace for TensorBoard's profile plugin."""

    steps: str = ""
    """range FIRST:LAST of steps, LAST excluded, e.g. 10:20; empty = only on a signal"""
    signal_steps: Count = 5
    """number of steps that are traced when the process gets the signal SIGUSR1"""

    def __post_init__(self):
        check(self, "profile")
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
class TrackerConfig:
    """A tracker of experiments that gets the numbers of the run (`hnet.train.tracker`)."""

    name: str = ""
    """trackio, wandb, or a class as package.module:Class; empty = none"""
    project: str = "hnet"
    """project of the tracker, which the run is named in by its work directory"""


@dataclass(frozen=True)
class Sections:
    """All settings of a run except its model."""

    # Fields of earlier versions, in the order in which they got these names.
    renamed = {
        "controller": "rate_control",
        "rate_control.settle_bytes": "offset_bytes",
        "train.packed_rows": "rows_sharing_slots",
    }

    workdir: FilePath = "runs/default"
    """folder of this run, local or gs://bucket/folder; the same command again resumes the run"""
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0
    """seed of the initialisation, the noise and the order of the data"""
    data: DataConfig = DataConfig()
    init: InitConfig = InitConfig()
    optim: OptimConfig = OptimConfig()
    rate_control: RateControlConfig = RateControlConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    profile: ProfileConfig = ProfileConfig()
    tracker: TrackerConfig = TrackerConfig()
