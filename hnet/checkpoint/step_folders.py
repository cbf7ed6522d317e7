"""The step folders of a work directory: find, verify, delete and rename them, clear one for a save.

Only process 0 changes anything here.
"""

import logging
import os
import re

from etils import epath

from hnet.checkpoint import manifest
from hnet.errors import ConfigError, first_line, shown

log = logging.getLogger(__name__)

STATE = "state"
"""name of Orbax's folder inside a step folder"""


def work_folder(workdir: str | os.PathLike) -> epath.Path:
    """Path of a work directory: a local folder or one in a bucket (``gs://...``).

    Raises ConfigError if the bucket cannot be opened, e.g. without its package or credentials.
    """
    if "://" not in os.fspath(workdir):
        return epath.Path(workdir).expanduser().absolute()
    try:
        path = epath.Path(workdir)
        path.exists()
    except KeyError:  # etils does not know this kind of address
        raise ConfigError(
            f"workdir {shown(os.fspath(workdir))} is an address of an unknown kind: use a local "
            "folder or gs://BUCKET/FOLDER"
        ) from None
    except Exception as e:  # each file system raises its own type
        raise ConfigError(f"workdir {str(workdir)!r} cannot be opened: {first_line(e)}") from None
    return path


def split_step(given: str) -> tuple[str, int | None]:
    """(work directory, step) of `WORKDIR@STEP` or `WORKDIR/checkpoints/STEP`; another path is
    (path, None)."""
    for pattern, text in ((_FOLDER, given), (_FOLDER, _absolute(given)), (_AT, given)):
        if (found := pattern.fullmatch(text)) and (pattern is _FOLDER or not _exists(given)):
            return found[1], int(found[2])
    return given, None


_FOLDER = re.compile(r"(.+)/checkpoints/(\d{1,10})/*")
_AT = re.compile(r"(.+)@(\d{1,10})")


def _absolute(given: str) -> str:
    """A local path as an absolute one: the step folder may be named from inside its run."""
    return given if "://" in given or not given else os.path.abspath(given)


def _exists(given: str) -> bool:
    try:
        return os.path.lexists(given)
    except ValueError:  # it has a zero byte
        return False


def checkpoint_folder(workdir: str | os.PathLike) -> epath.Path:
    """``WORKDIR/checkpoints``. Raises ConfigError like `work_folder`, and for what cannot be a path
    or may not be looked into."""
    folder = work_folder(workdir) / "checkpoints"
    try:
        folder.exists()
        return folder
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(f"workdir={shown(str(workdir))} cannot be used: {reason}") from None


def list_steps(folder: epath.Path) -> list[int]:
    """Steps with a folder, oldest first, whether good, damaged or unfinished."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def list_saved(folder: epath.Path) -> list[int]:
    """Steps with a manifest, oldest first: all whose save finished, damaged ones included."""
    return [s for s in list_steps(folder) if (folder / str(s) / manifest.FILE_NAME).exists()]


def why_not(folder: epath.Path) -> str:
    """Reason why manifest or file sizes of a step do not verify; "" if they do."""
    try:
        manifest.check_files(folder, manifest.read(folder))
    except (manifest.Damaged, OSError) as e:
        return str(e)
    return ""


def make_room(folder: epath.Path, leaves: dict[str, dict]) -> bool:
    """Clear a step folder for a new save; False if it already holds exactly these leaves.

    Remains of a killed save are deleted; a checkpoint with other bits is renamed.
    """
    if is_unfinished(folder):
        folder.rmtree()
    elif folder.exists():
        if not why_not(folder) and manifest.read(folder).leaves == leaves:
            return False
        set_aside(folder)
    folder.mkdir(parents=True)
    (folder / manifest.PENDING_NAME).write_text("")
    return True


def tidy(newest: epath.Path, keep: int, keep_every: int) -> None:
    """After ``newest`` is durable, delete the checkpoints that ``keep`` does not cover.

    Later steps are from before the run went back; they are renamed, so that no start resumes from
    them. Damaged ones newer than the oldest one kept stay for inspection.
    """
    num_good = 0
    for step in reversed(list_steps(newest.parent)):
        folder = newest.parent / str(step)
        if folder != newest and is_unfinished(folder):
            folder.rmtree()
        elif step > int(newest.name):
            set_aside(folder)
        elif num_good < keep:
            num_good += not why_not(folder)
        elif not (keep_every and step % keep_every == 0) and (folder / manifest.FILE_NAME).exists():
            (folder / manifest.FILE_NAME).replace(
                folder / manifest.DELETING_NAME
            )  # never half a checkpoint
            folder.rmtree()


def is_unfinished(folder: epath.Path) -> bool:
    """Whether a folder is the remains of a killed save or deletion, with nothing to restore."""
    if not folder.is_dir():
        return False
    names = {p.name for p in folder.iterdir()}
    if manifest.DELETING_NAME in names:
        return True
    if manifest.PENDING_NAME in names:
        return manifest.FILE_NAME not in names
    return all(name.startswith(f"{STATE}.orbax-checkpoint-tmp") for name in names)


def set_aside(folder: epath.Path) -> epath.Path:
    """Rename a folder to ``<step>.aside-<n>``; its content stays unchanged."""
    n = 1
    while (target := folder.parent / f"{folder.name}.aside-{n}").exists():
        n += 1
    folder.rename(target)
    log.warning("%s is not of the run that goes on: renamed to %s", folder, target.name)
    return target
