"""Training: ``train.run(config)``, optionally with your own step, loss or evaluation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hnet.train.compiled_run import Change
    from hnet.train.config import Config
    from hnet.train.observer import Observer
    from hnet.train.session import Outcome


def run(
    config: "Config", change: "Change | None" = None, observer: "Observer | None" = None
) -> "Outcome":
    """Train like `python -m experiments.pretrain`, from Python.

    change: function that maps the run's `hnet.train.compiled_run.Experiment` (init, step, evaluate,
    numbers, graph) to one with other functions, for example
    ``lambda run: dataclasses.replace(run, step=my_step)``.
    observer: object whose functions are called at each step, evaluation and line.
    A stop signal saves the state and ends the run; the same call resumes it.

    Raises ConfigError for settings that cannot work and `hnet.train.session.StopRun` if training
    fails.
    """
    from hnet.runtime.stop_request import StopRequest  # loads JAX
    from hnet.train.loop import train

    with StopRequest() as stop:
        return train(config, stop, observer, change)
