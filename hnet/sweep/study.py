"""The points of a sweep in an Optuna storage. Workers claim them, and no point is done twice.

A trial is one attempt at a point. One trial of a point counts: the oldest that is waiting, running
or finished. A worker that finds an older one than its own drops its own. A worker that dies leaves
running trials; when its heartbeat stops, other workers fail these trials and queue their points
again.
"""

import contextlib
import json
import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from hnet.data import identity
from hnet.data.identity import Inputs
from hnet.dotted import differences
from hnet.errors import ConfigError, told
from hnet.fields import to_json
from hnet.files import parse_json
from hnet.sweep.space import Point, Space, Values, list_points, make_point, point_key
from hnet.sweep.storage import open_storage, pruner
from hnet.train.config import Config, config_from_json
from hnet.train.lock import has_ended, process_name

_LOCAL = ("workdir", "mesh", "distributed", "watchdog", "checkpoint", "profile")
"""sections in which the workers of one sweep may differ"""
_MAX_DRAWS = 20  # draws of points that exist already, before a space counts as exhausted


@dataclass
class Claim:
    """A point that this worker has claimed."""

    trial: Trial
    point: Point
    pruned: bool = False


class Study(contextlib.AbstractContextManager):
    """One worker's view of a sweep. As a context manager, it writes heartbeats to the storage."""

    def __init__(
        self, storage: str, name: str, base: Config, space: Space, timeout: float,
        inputs: Inputs | None = None,
    ):  # fmt: skip
        """timeout: seconds without a heartbeat after which a worker counts as dead. inputs:
        fingerprints of the text of `base`, None if unknown.

        Raises ConfigError if the study in the storage belongs to another sweep.
        """
        self.base, self.space, self.timeout, self.inputs = base, space, timeout, inputs
        self.worker = process_name()
        self.points = list_points(base, space)
        self._known = {point.key: point for point in self.points or ()}
        self._distributions = space.distributions()
        self._seen: dict[str, tuple[Any, float, float]] = {}
        self.study = optuna.create_study(
            storage=open_storage(storage), study_name=name, direction="minimize",
            pruner=pruner(space.pruner), load_if_exists=True,
        )  # fmt: skip
        self._check_identity(storage, name)
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def _check_identity(self, storage: str, name: str) -> None:
        choices = {k: str(v) for k, v in self._distributions.items()}
        listed = None if self.points is None else [point.key for point in self.points]
        space = {"sampler": self.space.sampler, "trials": self.space.trials, "points": listed}
        mine = {"space": {**space, **choices, "seed": list(self.space.seeds)}}
        mine |= {"config": to_json(self.base), "inputs": self.inputs}
        if (found := self.study.user_attrs.get("sweep")) is None:
            self.study.set_user_attr("sweep", json.dumps(mine))
            return
        theirs = parse_json(found)
        theirs["config"] = to_json(config_from_json(theirs["config"]))  # adds newer fields
        for content in (mine, theirs):
            for section in _LOCAL:
                del content["config"][section]
        there = f"study {name!r} in {storage}"
        if self.inputs is None or theirs.get("inputs") is None:  # written by an earlier version
            mine["inputs"] = theirs["inputs"] = None
        elif self.inputs == theirs["inputs"]:  # may be spelled in another way
            _drop(identity.NAMES, mine, theirs)
        _drop(identity.SPEED, mine, theirs)
        for field, new, old in differences(mine, theirs):
            raise ConfigError(
                f"{there} is another sweep: {field} is {told(old)} there, here "
                f"{told(new)}: use that, or another --study or --out"
            )

    def __enter__(self) -> "Study":
        self._heart.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._ended.set()
        self._heart.join()

    def _beat(self) -> None:
        count = 0
        while True:
            with contextlib.suppress(Exception):  # the storage may be unreachable for a while
                self.study.set_user_attr(f"beat/{self.worker}", count)
            count += 1
            if self._ended.wait(self.timeout / 5):
                return

    def point(self, values: Values) -> Point:
        key = point_key(values)
        if key not in self._known:
            self._known[key] = make_point(self.base, self.space, values)
        return self._known[key]

    def trials(self) -> list[FrozenTrial]:
        """All trials, oldest first."""
        return self.study.get_trials(deepcopy=False)

    def finished(self) -> list[FrozenTrial]:
        """One trial per point that is done, pruned or failed, oldest first."""
        return [t for t in self.trials() if _is_live(t) and t.state.is_finished()]

    @property
    def num_points(self) -> int:
        return self.space.trials if self.points is None else len(self.points)

    def num_done(self) -> int:
        return len(self.finished())

    def is_pending(self) -> bool:
        """Whether some point is claimed or can still be claimed."""
        return any(not t.state.is_finished() for t in self.trials())

    def claim(self, limit: int) -> list[Claim]:
        """Up to `limit` points, of one program if points are listed; none if all are taken."""
        self._fail_dead()
        self._queue_lost()
        claims: list[Claim] = []
        draws = 0
        while len(claims) < limit and draws < _MAX_DRAWS:
            trials = self.trials()
            waiting = [t for t in trials if t.state == TrialState.WAITING]
            if waiting and claims and self._group(waiting[0]) != claims[0].point.group:
                break
            if not waiting and (self.points or sum(map(_is_live, trials)) >= self.num_points):
                break
            trial = self._ask(len(trials))
            if self._counts(trial):
                values = self.space.values(trial.params)
                try:
                    claims.append(Claim(trial, self.point(values)))
                except ConfigError as e:  # known only now: the sampler chose the values
                    self._fail(trial, str(e))
            else:
                draws += 1
                trial.set_user_attr("dropped", True)
                self._tell(trial.number, state=TrialState.FAIL)
        return claims

    def _ask(self, count: int) -> Trial:
        if self.points is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # a new sampler each time, so that its draws depend only on the study
                self.study.sampler = optuna.samplers.TPESampler(seed=count, constant_liar=True)
        trial = self.study.ask(self._distributions)
        trial.set_user_attr("worker", self.worker)
        return trial

    def _group(self, trial: FrozenTrial) -> str:
        return self.point(self.space.values(_params(trial))).group

    def _counts(self, mine: Trial) -> bool:
        """Whether a claimed trial is the oldest of its point and within the number of trials."""
        older = [t for t in self.trials()[: mine.number] if _is_live(t)]
        if any(_params(t) == mine.params for t in older):
            return False
        return len(older) < self.num_points

    def _fail_dead(self) -> None:
        beats = self.study.user_attrs
        for trial in self.trials():
            if trial.state != TrialState.RUNNING:
                continue
            worker = trial.user_attrs.get("worker", f"trial {trial.number}")
            if worker == self.worker:
                continue
            if self._silence(worker, beats) > self.timeout or has_ended(worker):
                self._tell(trial.number, state=TrialState.FAIL)

    def _silence(self, worker: str, beats: dict[str, Any]) -> float:
        """Seconds for which this worker has seen no heartbeat of another one, by its own clock.

        The time between two checks counts at most a quarter of the timeout, so that a worker that
        was suspended or busy sees the others again before it gives them up.
        """
        beat, now = beats.get(f"beat/{worker}", "none"), time.monotonic()
        before, silence, looked = self._seen.get(worker, (None, 0.0, now))
        silence = silence + min(now - looked, self.timeout / 4) if beat == before else 0.0
        self._seen[worker] = beat, silence, now
        return silence

    def _queue_lost(self) -> None:
        """Queue every point that was listed or started and has no trial that counts."""
        trials = self.trials()
        live = {self._key(t) for t in trials if _is_live(t)}
        lost = {p.key: p.values for p in self.points or ()}
        for trial in trials:
            complete = _params(trial).keys() == self._distributions.keys()
            if not _is_live(trial) and complete and not trial.user_attrs.get("dropped"):
                lost[self._key(trial)] = self.space.values(_params(trial))
        for key, values in lost.items():
            if key not in live:
                self.study.enqueue_trial(json.loads(point_key(values)))

    def _key(self, trial: FrozenTrial) -> str:
        return json.dumps(dict(sorted(_params(trial).items())))

    def report(self, claim: Claim, step: int, bpb: float) -> None:
        """Report the bits per byte of a point during training, as the mean over its seeds."""
        claim.trial.report(bpb, step)

    def should_prune(self, claim: Claim) -> bool:
        return claim.trial.should_prune()

    def finish(self, claim: Claim, runs: Iterable[dict[str, Any]], bpb: float | None) -> bool:
        """Write the results of a point's runs; bpb: their mean, None if it was pruned.

        False if another worker has finished the point meanwhile.
        """
        with contextlib.suppress(*_TAKEN):
            claim.trial.set_user_attr("runs", list(runs))
        state = TrialState.PRUNED if bpb is None else TrialState.COMPLETE
        return self._tell(claim.trial.number, values=bpb, state=state)

    def fail(self, claim: Claim, fault: str) -> None:
        """Record a point that cannot be trained; it is not tried again."""
        self._fail(claim.trial, fault)

    def _fail(self, trial: Trial, fault: str) -> None:
        with contextlib.suppress(*_TAKEN):
            trial.set_user_attr("fault", fault)
        self._tell(trial.number, state=TrialState.FAIL)

    def release(self, claims: Iterable[Claim]) -> None:
        """Return points, so that the next claim takes them."""
        for claim in claims:
            self._tell(claim.trial.number, state=TrialState.FAIL)
        self._queue_lost()

    def _tell(self, number: int, **outcome) -> bool:
        try:
            self.study.tell(number, **outcome)
        except _TAKEN:
            return False
        return True


def _drop(fields: Iterable[str], *sweeps: dict[str, Any]) -> None:
    """Remove fields of `data` that two descriptions of a sweep need not share."""
    for sweep in sweeps:
        for field in fields:
            sweep["config"]["data"].pop(field, None)


_TAKEN = (ValueError, optuna.exceptions.UpdateFinishedTrialError)
"""errors that Optuna raises for a trial that another worker has finished"""


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """Parameters of a trial, which may still be waiting."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _is_live(trial: FrozenTrial) -> bool:
    """Whether a trial is waiting, running, finished or a recorded failure."""
    return trial.state != TrialState.FAIL or "fault" in trial.user_attrs
