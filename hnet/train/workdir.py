"""A work directory's config.json: what the run there is, and whether a start may go on with it."""

import json
import os
from typing import Any

from hnet.errors import ConfigError
from hnet.fields import differences, to_json
from hnet.train.config import Config, config_from_json
from hnet.train.step_folders import work_folder


def read_config(workdir: str | os.PathLike) -> Config:
    """The configuration a run was started with. Raises ConfigError if there is none."""
    content = _stored(workdir)
    if isinstance(content, dict):  # what an earlier version did where it said nothing
        if isinstance(controller := content.get("controller"), dict):
            controller.setdefault("hold_frac", 1.0)
        if isinstance(data := content.get("data"), dict):
            data.pop("unknown_script_frac", None)
    return config_from_json(content)


def _stored(workdir: str | os.PathLike) -> Any:
    file = work_folder(workdir) / "config.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist: give the work directory of a run") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{file} cannot be read: {e}") from None


# What may not change between two starts in the same work directory: the parameters and which bytes
# batch k holds depend on it.
_FIXED = ("model", "data", "seed")


def claim_workdir(config: Config) -> None:
    """Write config.json, or check that the run there is this one.

    Raises ConfigError naming the first field that differs in a way that makes it another run. A
    changed setting of the rest is allowed; the former file is kept as config-N.json.
    """
    folder = work_folder(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    file, content = folder / "config.json", to_json(config)
    if file.exists():
        before = to_json(read_config(folder))
        if gone := _stored(folder).get("data", {}).get("unknown_script_frac"):
            raise ConfigError(
                f"the run in workdir={config.workdir} has data.unknown_script_frac={gone!r}, which "
                "is not trained with any more: use another workdir to start anew"
            )
        if before == content:
            return
        for path, old, new in differences(before, content):
            if path.split(".")[0] in _FIXED and not path.startswith("model.compute"):
                raise ConfigError(
                    f"{path}={new!r}, but the run in workdir={config.workdir} has {old!r}: "
                    "use that value to resume it, or another workdir"
                )
        n = 1
        while (folder / f"config-{n}.json").exists():
            n += 1
        file.rename(folder / f"config-{n}.json")
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(file)
