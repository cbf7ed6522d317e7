"""config.json of a work directory: read it, and check that a start may resume its run."""

import contextlib
import json
import os
import shlex
from collections.abc import Iterator
from typing import Any

from hnet.checkpoint.step_folders import checkpoint_folder, work_folder
from hnet.data import Corpus, DataConfig, identity
from hnet.data.identity import Inputs, check_inputs, read_inputs, write_inputs
from hnet.dotted import differences
from hnet.errors import ConfigError, Failed, told
from hnet.fields import to_json
from hnet.files import parse_json, read_bytes
from hnet.outputs import local_folder
from hnet.runtime.distributed import on_first_host
from hnet.train.config import Config, config_from_json
from hnet.train.lock import DirectoryLock
from hnet.train.log_folder import METRICS, TENSORBOARD


def read_config(workdir: str | os.PathLike) -> Config:
    """The configuration of the run in a work directory. Raises ConfigError if there is none."""
    content = _stored(workdir)
    if isinstance(content, dict):  # defaults of an earlier version
        content["workdir"] = content.get("workdir") or "."
        if isinstance(controller := content.get("controller"), dict):
            controller.setdefault("hold_frac", 1.0)
        if isinstance(data := content.get("data"), dict):
            data.pop("unknown_script_frac", None)
    try:
        return config_from_json(content)
    except ConfigError as e:
        raise ConfigError(f"{work_folder(workdir) / 'config.json'} cannot be read: {e}") from None


def tokenizer_of(workdir: str | os.PathLike, data: DataConfig) -> str:
    """File of the tokenizer of a run, also if its work directory was moved; empty: none."""
    own = work_folder(workdir) / os.path.basename(data.tokenizer)
    return str(own) if data.tokenizer and own.exists() else data.tokenizer


def check_tokenizer(workdir: str | os.PathLike, data: DataConfig) -> None:
    """Raise ConfigError if the tokenizer of a run is not the file that it was trained with; a
    missing file is no error here."""
    path, name = tokenizer_of(workdir, data), "data.tokenizer"
    before = (read_inputs(workdir) or {}) if os.path.exists(path) else {}
    if name in before:
        now = identity.inputs(DataConfig(tokenizer=path), None)
        check_inputs(
            {name: before[name]}, now, f"the run in {os.fspath(workdir)}", "give it the same file"
        )


def check_text(
    workdir: str | os.PathLike, data: DataConfig, corpus: Corpus | None, remedy: str = ""
) -> None:
    """Raise ConfigError if the text of a run (None: it is not read), or its tokenizer, has changed
    since the run. data: its settings, as in its config.json."""
    now, before = identity.inputs(data, corpus), read_inputs(workdir) or {}
    check_inputs(
        {name: before.get(name, now[name]) for name in now}, now,
        f"the run in {os.fspath(workdir)}", remedy or "give it the same content",
    )  # fmt: skip


def _stored(workdir: str | os.PathLike) -> Any:
    file = work_folder(workdir) / "config.json"
    try:
        return parse_json(read_bytes(file))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist: give the work directory of a run") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} cannot be read: {e}") from None


# Sections that may not change between two starts in the same work directory: the parameters and
# the content of batch k depend on them. A new run from its weights may change them all.
_FIXED = ("model", "data", "seed", "init")
_SPEED = {f"data.{name}" for name in identity.SPEED}
_NAMES = {f"data.{name}" for name in identity.NAMES}
_MAY_CHANGE = ("eval.probe_files",)
"""settings that name files and may name others at a later start"""


def run_inputs(config: Config, corpus: Corpus) -> dict[str, str]:
    """Fingerprints of all inputs of a run. Raises ConfigError for a file that cannot be read."""
    return identity.inputs(config.data, corpus, {"eval.probe_files": config.eval.probe_files})


@contextlib.contextmanager
def locked_workdir(config: Config, read: Inputs | None = None) -> Iterator[None]:
    """Lock the work directory and check its run; raises ConfigError like `changes`.

    Host 0 does both for all hosts.
    """

    def enter() -> None:
        stack.enter_context(DirectoryLock(config.workdir))
        if changes(config, read) is None:
            check_free(config.workdir)

    with contextlib.ExitStack() as stack:
        on_first_host("lock", enter)
        yield


def check_workdir(workdir: str | os.PathLike) -> None:
    """Raise ConfigError unless files can be made in a work directory, which may not exist yet."""
    folder = work_folder(workdir)
    if "://" not in os.fspath(workdir):
        local_folder(folder, "workdir")


def check_free(workdir: str | os.PathLike) -> None:
    """Raise ConfigError if a folder without a run has files under names that a run writes to: it
    would drop their content as steps of an earlier start."""
    folder = work_folder(workdir)
    for path in (folder / METRICS, folder / TENSORBOARD, checkpoint_folder(workdir)):
        if path.is_dir() and any(path.iterdir()) or path.exists() and not path.is_dir():
            raise ConfigError(
                f"workdir={os.fspath(workdir)} has {path.name}, but no config.json of a run that "
                "wrote it: use another workdir"
            )


def check_steps(config: Config, workdir: str, done: int) -> None:
    """Raise ConfigError if a run has done more updates than `train.steps`."""
    if done > config.train.steps:
        raise ConfigError(
            f"train.steps={config.train.steps}, but the run in workdir={workdir} has done {done} "
            f"already: use {done} or more, or another workdir"
        )


Change = tuple[str, Any, Any]
"""(dotted field, value of the run in a work directory, value of this start)"""


def changes(config: Config, read: Inputs | None = None) -> list[Change] | None:
    """Settings in which the run in the work directory differs; None if there is no run yet.

    read: fingerprints of the inputs of this start (`run_inputs`). If they are those of the run, the
    inputs may be spelled in another way. Raises ConfigError if an input or a field that may not
    change differs; the message names the innermost field.
    """
    folder = work_folder(config.workdir)
    if not (folder / "config.json").exists():
        return None
    before = to_json(read_config(folder))
    if gone := _stored(folder).get("data", {}).get("unknown_script_frac"):
        raise ConfigError(
            f"the run in workdir={config.workdir} has data.unknown_script_frac={gone!r}, which "
            "is not trained with any more: use another workdir to start anew"
        )
    now = to_json(config) | {"workdir": before["workdir"]}  # may be moved or respelled
    found = list(differences(before, now))
    workdir = shlex.quote(config.workdir)
    remedy = f"start from its weights in another workdir: --init.from {workdir} --workdir NEW"
    named = {path for path, _, _ in found}
    then = read_inputs(folder) if read is not None else None
    now_read = dict(read or {})
    for field in _MAY_CHANGE:
        if then is not None and any(path.startswith(field) for path in named):
            then.pop(field, None), now_read.pop(field, None)
    for path, old, new in found:
        if path.split(".")[0] not in _FIXED or path.startswith("model.compute"):
            continue
        field = ".".join(path.split(".")[:2])
        if field in _SPEED or (field in _NAMES and then == now_read):
            continue
        texts = ""
        if then and field in _NAMES:
            texts = f" (fingerprint {now_read.get('data.files')}, there {then.get('data.files')})"
        raise ConfigError(
            f"{path}={told(new)}, but the run in workdir={config.workdir} has {told(old)}"
            f"{texts}: use that value to resume it, or {remedy}"
        )
    check_inputs(
        then, now_read, f"the run in workdir={config.workdir}",
        f"give it the same content to resume, or {remedy}",
    )  # fmt: skip
    return found


def claim_workdir(
    config: Config, read: Inputs | None = None, *, done: int = 0, ended: bool = False
) -> list[str]:
    """Write config.json and inputs.json, or check that they belong to this run; returns lines to
    print.

    Raises ConfigError like `changes`. Other changed settings are allowed and reported, and the
    former file is kept as config-N.json. done: number of updates of the run so far. ended: the run
    has nothing left to do, so changed settings have no effect and the files stay as they are.
    """
    folder = work_folder(config.workdir)
    found = changes(config, read)
    lines = [f"{path}={told(new)} (it was {told(old)})" for path, old, new in found or ()]
    if ended:
        return [
            f"{line}: no effect, as the run in workdir={config.workdir} ended at step {done}; "
            "use a larger train.steps to go on, or another workdir to start anew"
            for line in lines
        ]
    file = folder / "config.json"
    temporary = folder / "config.json.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if read is not None and (found is None or read_inputs(folder) != dict(read)):
            write_inputs(folder, read)
        if found == []:
            return []
        temporary.write_text(json.dumps(to_json(config), indent=1) + "\n")
        if found:
            n = 1
            while (former := folder / f"config-{n}.json").exists():
                n += 1
            file.copy(former)
        temporary.replace(file)
    except OSError as e:
        written = [temporary, folder / f"{identity.FILE_NAME}.tmp"]
        for path in [*written, folder / identity.FILE_NAME] if found is None else written:
            with contextlib.suppress(OSError):
                path.unlink()
        raise Failed(f"workdir={config.workdir} cannot be written to ({e.strerror})") from None
    return [f"{line} from step {done} on; former settings: {former.name}" for line in lines]
