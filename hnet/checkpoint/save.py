"""Checkpoints that resume the same run: Orbax for the arrays, a manifest that vouches for them.

    WORKDIR/checkpoints/<step>/state/          written by Orbax (v0 API), in parallel, in one move
    WORKDIR/checkpoints/<step>/manifest.json   written last by process 0; see ``manifest``

``python -m hnet.checkpoint verify WORKDIR`` reads every checkpoint back and prints a line
for each; exit code 1 if none is good, 2 for bad input.
"""

import contextlib
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from hnet.checkpoint import leaves, manifest, step_folders
from hnet.checkpoint.manifest import Damaged, Manifest
from hnet.checkpoint.quiet import quiet_orbax
from hnet.checkpoint.settings import CheckpointConfig
from hnet.checkpoint.verify import read_arrays
from hnet.errors import ConfigError, Failed, first_line
from hnet.runtime import distributed

log = logging.getLogger(__name__)

_SAVED = "saved already"
# Arrays are stored in pieces, so that no full compressed copy of an array is held in memory.
_CHUNK_BYTES, _FILE_BYTES = 1 << 26, 1 << 28


class CheckpointError(Failed):
    """A save failed: one line with the step and the reason."""


class Restored(NamedTuple):
    """What ``Checkpointer.restore`` returns."""

    state: Any
    """tree of the requested structure, shardings and dtypes"""
    extras: dict[str, Any]
    """JSON content given to ``save``"""
    step: int
    """step of the checkpoint"""
    rejected: list[str]
    """messages, one per newer step that could not be used"""


class Checkpointer(contextlib.AbstractContextManager):
    """Saves to and restores from ``workdir``; all processes make the same calls."""

    def __init__(self, workdir: str | os.PathLike, config: CheckpointConfig = CheckpointConfig()):
        self.folder = step_folders.checkpoint_folder(workdir)
        self.config = config
        # A synchronous save copies at most 1 GB of arrays to the host at a time, not all of them.
        most_copied_gb = None if config.asynchronous else 1
        import orbax.checkpoint as ocp  # imported late: commands parse arguments first

        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(save_device_host_concurrent_gb=most_copied_gb),
            async_options=ocp.AsyncOptions(timeout_secs=config.timeout_seconds),
        )
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(quiet_orbax())
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future | None = None
        self._saving_step = -1
        self._has_failed = False  # whether the last finished save did

    def __exit__(self, *exc_info) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps whose save finished, oldest first, damaged ones included; empty for a new run."""
        return step_folders.list_saved(self.folder)

    def latest_good_step(self, latest: int | None = None) -> int | None:
        """Newest step whose manifest and files verify (``restore`` also compares the values).

        latest: largest step to consider; default: no limit.
        """
        steps = [s for s in self.steps() if latest is None or s <= latest]
        good = next(
            (s for s in reversed(steps) if not step_folders.why_not(self.folder / str(s))), None
        )
        step = distributed.exchange("checkpoint/latest", "" if good is None else str(good))[0]
        return int(step) if step else None

    def manifest(self, step: int | None = None) -> Manifest:
        """The manifest of a step (default: the newest good one), for example to rebuild the model.

        Raises ConfigError if there is none.
        """
        if step is None and (step := self.latest_good_step()) is None:
            raise ConfigError(f"no usable checkpoint in {self.folder}: train there first")
        try:
            return manifest.read(self.folder / str(step))
        except Damaged as e:
            raise ConfigError(f"checkpoint {self.folder / str(step)}: {e}") from None

    def save(self, step: int, state: Any, extras: dict[str, Any]) -> bool:
        """Save a tree of arrays and plain JSON as one checkpoint; returns whether it was needed.

        The state may be donated as soon as this returns. If the step is already saved with the
        same bits, nothing is written and the result is False. If it is saved with other bits (the
        run went back), the old folder is renamed.
        Raises CheckpointError if this save fails or the previous one failed in the background.
        """
        error = self._outcome(wait=True)
        named, _ = leaves.flatten(state)
        arrays = {path: leaves.raw(leaf) for path, leaf in named.items()}
        sums = leaves.checksums(arrays)
        schema = leaves.describe(named)
        leaf_of = {path: schema[path] | {"checksum": sums[path]} for path in named}
        record = manifest.make_manifest(step, leaf_of, extras)
        answer = error or self._make_room(step, leaf_of)
        answers = distributed.exchange("checkpoint/save", answer, self.config.timeout_seconds)
        if errors := [a for a in answers if a not in ("", _SAVED)]:
            raise CheckpointError(errors[0])
        if answers[0] == _SAVED:
            return False
        import orbax.checkpoint as ocp

        # Orbax stores no empty arrays; their shape and dtype are in the manifest.
        tree = leaves.nest({path: x for path, x in arrays.items() if x.size})
        try:
            in_chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
            arguments = ocp.args.PyTreeSave(
                tree, in_chunks, ocdbt_target_data_file_size=_FILE_BYTES
            )
            self._orbax.save(self.folder / str(step) / step_folders.STATE, args=arguments)
        except Exception as e:
            self._has_failed = True
            raise CheckpointError(_failure(step, e)) from e
        self._saving_step = step
        self._saving = self._pool.submit(self._finish, record)
        if not self.config.asynchronous:
            self.wait()
        return True

    def _finish(self, record: Manifest) -> None:
        """In the background: wait for all hosts' arrays, write the manifest, delete old steps."""
        self._orbax.wait_until_finished()
        if distributed.host_id() == 0:
            folder = self.folder / str(record.step)
            record = replace(record, files=manifest.list_files(folder))
            manifest.write(folder, record)
            (folder / manifest.PENDING_NAME).unlink()
            manifest.check_files(
                folder, manifest.read(folder)
            )  # read back before old ones are deleted
            try:
                step_folders.tidy(folder, self.config.keep, self.config.keep_every)
            except OSError as e:
                log.warning("old checkpoints could not be deleted: %s", first_line(e))

    def _make_room(self, step: int, leaf_of: dict[str, dict]) -> str:
        """Process 0 prepares the folder; returns "", _SAVED (nothing to do) or an error message."""
        if distributed.host_id():
            return ""
        try:
            return "" if step_folders.make_room(self.folder / str(step), leaf_of) else _SAVED
        except OSError as e:
            return _failure(step, e)

    def _outcome(self, wait: bool) -> str:
        """Error of the background save; "" if it succeeded (without ``wait``: or still runs)."""
        if self._saving is None or not (wait or self._saving.done()):
            return ""
        saving, self._saving = self._saving, None
        error = saving.exception()
        self._has_failed = error is not None
        return _failure(self._saving_step, error) if error else ""

    def check(self) -> None:
        """Raise CheckpointError if the background save failed. To be called in every step."""
        if error := self._outcome(wait=False):
            raise CheckpointError(error)

    def wait(self) -> None:
        """Wait until the last save is durable. Raises CheckpointError if it failed."""
        if error := self._outcome(wait=True):
            raise CheckpointError(error)

    def close(self) -> None:
        """Wait for the last save and end the threads. Raises CheckpointError if it failed."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._close_orbax)
            stack.enter_context(self._pool)
            self.wait()

    def _close_orbax(self) -> None:
        """Orbax raises once more, as another type, what failed in the last save."""
        try:
            self._orbax.close()
        except Exception as e:
            if not self._has_failed:
                raise CheckpointError(_failure(self._saving_step, e)) from None
        if not self._has_failed:  # else writes of the failed save may still end, and be told
            self._quiet.close()

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints of later steps, because the run continues from this one."""

        def rename() -> None:
            for later in step_folders.list_steps(self.folder):
                if later > step:
                    step_folders.set_aside(self.folder / str(later))

        distributed.on_first_host("checkpoint/aside", rename)

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        *,
        only: str = "",
        latest: int | None = None,
    ) -> Restored:
        """Read the newest checkpoint whose values verify, up to ``latest``, or exactly ``step``.

        ``abstract_state``: tree of ``jax.ShapeDtypeStruct`` (or of arrays) with shardings of the
        CURRENT mesh; the mesh and the number of processes of the save do not matter. With
        ``only="params"`` just that subtree is read, and ``abstract_state`` is the subtree. Each
        unusable newer step is reported in one line and skipped. Raises ConfigError for another
        architecture or dtype, if no step is usable, or if ``step`` is not usable.
        """
        self.wait()
        wanted, treedef = leaves.flatten(abstract_state, only)
        folders = ",".join(map(str, step_folders.list_steps(self.folder)))
        found = distributed.exchange("checkpoint/list", folders)[0]
        steps = [int(s) for s in found.split(",") if s and (latest is None or int(s) <= latest)]
        if step is not None and step not in steps:
            raise ConfigError(f"checkpoint step {step} is not in {self.folder}: it has {steps}")
        rejected: list[str] = []
        for candidate in [step] if step is not None else reversed(steps):
            named, extras, why = self._try_restore(candidate, wanted, only)
            if not why:
                for line in rejected:
                    log.warning(line)
                state = jax.tree.unflatten(treedef, [named[path] for path in wanted])
                return Restored(state, extras, candidate, rejected)
            rejected.append(f"checkpoint step {candidate} rejected: {why}")
        raise ConfigError(
            f"no usable checkpoint in {self.folder}"
            + (f" ({'; '.join(rejected[:3])})" if rejected else "")
            + ": repair it, or start in another workdir"
        )

    def _try_restore(self, step: int, wanted: dict[str, Any], only: str) -> tuple[dict, dict, str]:
        """(arrays by path, extras, reason to reject or ""); the reason is the same on all hosts."""
        folder = self.folder / str(step)
        if why := self._agree(step_folders.why_not(folder)):
            return {}, {}, why
        record = manifest.read(folder)
        below = f"{only}/" if only else ""
        saved = {p: leaf for p, leaf in record.leaves.items() if f"{p}/".startswith(below)}
        leaves.check_schema(
            str(folder), saved, leaves.describe(wanted), cast_dtype=self.config.cast_dtype
        )
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = {p: getattr(x, "sharding", None) or one_device for p, x in wanted.items()}
        arrays, why = {}, ""
        try:
            arrays = read_arrays(self._orbax, folder, record, shardings)
        except Damaged as e:
            why = str(e)
        except Exception as e:  # Orbax raises many types for damaged files
            why = f"it cannot be read ({first_line(e)})"
        if why := self._agree(why):
            return {}, {}, why
        named = {path: leaves.as_wanted(arrays[path], leaf) for path, leaf in wanted.items()}
        return named, record.extras, ""

    def _agree(self, why: str) -> str:
        """Reason to reject a step, of the first host that has one; "" if no host has one."""
        answers = distributed.exchange("checkpoint/restore", why, self.config.timeout_seconds)
        return next((answer for answer in answers if answer), "")


def _failure(step: int, error: BaseException) -> str:
    host = f" on host {distributed.host_id()}" if distributed.num_hosts() > 1 else ""
    return f"checkpoint of step {step} could not be saved{host}: {first_line(error)}"
