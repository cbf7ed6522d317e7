"""The state of a run besides its arrays, and where a start takes both from."""

from dataclasses import dataclass, field

import jax

from hnet.checkpoint.save import Checkpointer
from hnet.train.compiled_run import CompiledRun
from hnet.train.config import Config
from hnet.train.initial import open_start, replaced, table
from hnet.train.sharding import replicated
from hnet.train.spikes import no_spikes
from hnet.train.step import TrainState, with_params


@dataclass
class RunState:
    """State of a run besides its arrays; plain JSON in every checkpoint."""

    data: int = 0
    """number of the next batch"""
    bytes_seen: int = 0
    """number of source bytes scored so far"""
    source_bytes: tuple[int, ...] = ()
    """bytes_seen of each source of a mixture, in the order of data.files"""
    rollbacks: int = 0
    ladder: dict = field(default_factory=dict)
    settled: int = 0
    """step whose parameters got exact boundary offsets"""
    evaluated: int = -1
    """step of the last evaluation that was logged"""
    new_counts: tuple[int, ...] = ()
    """largest number of slots that a row of slots needed in the last step read, by stage; passed to
    the ladder one step later"""


def first_state(
    config: Config, checkpoints: Checkpointer, program: CompiledRun
) -> tuple[TrainState, RunState, list[str]]:
    """State and position of the start, and lines that say what its parameters are."""
    start = None
    if checkpoints.steps():
        state, position = restored(checkpoints, program)
    else:
        if config.init.from_:
            start = open_start(config.init, program.graph, program.abstract_state.params)
        state, position = program.init(), RunState()
        if start:
            state = with_params(state, replaced(state.params, start))
    if not (start or config.init.freeze):
        return state, position, []
    return state, position, table(program.graph, state.params, start)


def restored(
    checkpoints: Checkpointer, program: CompiledRun, *, latest: int | None = None
) -> tuple[TrainState, RunState]:
    """The newest good state. The spike rule may be turned on or off between two starts."""
    wanted = program.abstract_state
    step = checkpoints.latest_good_step(latest)
    saved = () if step is None else checkpoints.manifest(step).leaves
    has_rule = any(path.startswith("spikes/") for path in saved)
    is_other = step is not None and has_rule != bool(wanted.spikes)
    if is_other:
        spikes = jax.device_put(no_spikes(), replicated(program.mesh))
        wanted = wanted._replace(spikes=spikes if has_rule else ())
    found = checkpoints.restore(wanted, latest=latest)
    state = found.state
    if is_other:
        state = state._replace(spikes=() if has_rule else spikes)
    return state, RunState(**found.extras["position"])
