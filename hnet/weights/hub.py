"""Weights on the Hugging Face Hub: `hf://owner/name[@revision]`, by its own library (extra `hub`).

HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE and HF_HUB_OFFLINE are what they are for every program of the
Hub. Whatever it says or does not say becomes one line.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hnet.errors import ConfigError
from hnet.weights.names import json_names, weights_among

SCHEME = "hf://"
SECONDS = 10.0  # until a Hub that does not answer is given up
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_address(path: str) -> bool:
    return path.startswith(SCHEME)


def parse(address: str) -> tuple[str, str | None]:
    """(owner/name, revision). Raises ConfigError for another form."""
    if not (match := _ADDRESS.fullmatch(address)):
        raise ConfigError(f"{address!r} is no address on the Hub: write hf://owner/name[@revision]")
    return match[1], match[2]


def check_library(address: str) -> None:
    """Raise ConfigError if the Hub's library is missing."""
    with _one_line(address):
        pass


def fetch(address: str) -> Path:
    """The weights of a repository, downloaded into the cache with the JSON files beside them.

    Raises ConfigError, in one line.
    """
    repository, revision = parse(address)
    with _one_line(address) as hub:
        if hub.constants.HF_HUB_OFFLINE:
            folder = hub.snapshot_download(
                repository, revision=revision, cache_dir=_cache(), local_files_only=True
            )
            return Path(folder) / weights_among(os.listdir(folder), address)
        api = _api(hub)
        found = api.model_info(repository, revision=revision, timeout=SECONDS)
        names = [file.rfilename for file in found.siblings or ()]
        weights = weights_among(names, address)
        wanted = [n for n in [*json_names(weights), "README.md"] if n in names] + [weights]
        paths = [Path(_download(api, repository, name, revision)) for name in wanted]
        if len({path.parent for path in paths}) > 1:
            raise ConfigError(f"{address!r} was changed while it was downloaded: try again")
        return paths[-1]


def upload(address: str, folder: Path, *, private: bool, replace_card: bool) -> str:
    """Put the files of a folder into a repository, in one commit; returns its address on the web.

    A repository that does not exist is made. A model card that is there stays, unless
    `replace_card`. Raises ConfigError, in one line.
    """
    repository, revision = parse(address)
    with _one_line(address) as hub:
        api = _api(hub)
        ignored = []
        try:
            found = api.model_info(repository, timeout=SECONDS)
            if not replace_card and "README.md" in [f.rfilename for f in found.siblings or ()]:
                ignored = ["README.md"]
                print(f"the model card of {repository} is kept", file=sys.stderr)
        except hub.errors.RepositoryNotFoundError:
            api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, ignore_patterns=ignored,
            commit_message="Weights, configuration and model card",
        )  # fmt: skip
        return str(commit.commit_url)


def _download(api: Any, repository: str, name: str, revision: str | None) -> str:
    return api.hf_hub_download(
        repository, name, revision=revision, cache_dir=_cache(), etag_timeout=SECONDS
    )


def _api(hub: Any) -> Any:
    return hub.HfApi(
        endpoint=os.environ.get("HF_ENDPOINT"), library_name="hnet-jax",
        token=os.environ.get("HF_TOKEN"),
    )  # fmt: skip


def _cache() -> str | None:
    return os.environ.get("HF_HUB_CACHE")


@contextlib.contextmanager
def _one_line(address: str) -> Iterator[Any]:
    """The Hub's library, whose complaints become one line."""
    try:
        import huggingface_hub as hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise ConfigError(
            f"{address!r} needs huggingface_hub, which is not installed: "
            "pip install 'hnet-jax[hub]'"
        ) from None
    if not sys.stderr.isatty():
        hub.utils.disable_progress_bars()
    try:
        yield hub
    except ConfigError:
        raise
    except hub.errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{address!r} is not on the Hub, or needs a token (HF_TOKEN): check the name"
        ) from None
    except hub.errors.RevisionNotFoundError:
        raise ConfigError(f"{address!r}: the Hub has no such revision: name another") from None
    except Exception as e:  # connections, time-outs, permissions, cache: each has its own errors
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ConfigError(f"{address!r}: the Hub cannot be used ({reason}): try again") from None
