"""The manifest of a checkpoint: schema, checksums, files; written last, checked first.

A step without a readable manifest is not a checkpoint.
"""

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from etils import epath

from hnet.errors import first_line, shown
from hnet.files import parse_json, read_bytes

FORMAT = 1
FILE_NAME = "manifest.json"
DELETING_NAME = "manifest.deleting"
PENDING_NAME = FILE_NAME + ".pending"
"""empty file in a step folder from before its save begins until its manifest is written"""
PACKAGES = ("hnet-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Damaged(ValueError):
    """A step cannot be used; the message gives the reason in a few words."""


@dataclass(frozen=True)
class Manifest:
    """Everything but the arrays of one checkpoint."""

    step: int
    """number of optimizer updates done"""
    leaves: dict[str, dict[str, Any]]
    """shape, dtype and checksum of each leaf by path"""
    files: dict[str, int]
    """size in bytes of each file by its path below the step folder"""
    extras: dict[str, Any]
    """JSON that the caller saved with the state: data position, counters, configuration"""
    schema_hash: str
    """SHA-256 of paths, shapes and dtypes"""
    config_hash: str
    """SHA-256 of ``extras["config"]``"""
    versions: dict[str, str]
    """versions of Python and the libraries that wrote it"""
    saved_at: str
    """time of the save, UTC, ISO 8601"""
    format: int = FORMAT

    @property
    def num_bytes(self) -> int:
        return sum(self.files.values())


def make_manifest(step: int, leaves: dict[str, dict], extras: dict[str, Any]) -> Manifest:
    """A manifest with no files yet. Raises TypeError or ValueError unless extras are plain JSON."""
    extras = json.loads(json.dumps(extras, allow_nan=False))
    schema = {path: [leaf["shape"], leaf["dtype"]] for path, leaf in leaves.items()}
    return Manifest(
        step=step,
        leaves=leaves,
        files={},
        extras=extras,
        schema_hash=json_hash(schema),
        config_hash=json_hash(extras.get("config")),
        versions={"python": sys.version.split()[0]} | {p: _version(p) for p in PACKAGES},
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def json_hash(content: Any) -> str:
    """SHA-256 (hex) of the canonical JSON text."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write(folder: epath.Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` atomically, with a digest of its own content."""
    content = asdict(manifest)
    text = json.dumps(content | {"digest": json_hash(content)}, indent=1, sort_keys=True)
    temporary = folder / (FILE_NAME + ".tmp")
    temporary.write_text(text)
    temporary.replace(folder / FILE_NAME)


def read(folder: epath.Path) -> Manifest:
    """Read the manifest of a step folder and check its digest. Raises Damaged."""
    try:
        content = parse_json(read_bytes(folder / FILE_NAME))
    except FileNotFoundError:
        raise Damaged(f"{FILE_NAME} is missing, so its save never finished") from None
    except (OSError, ValueError) as e:
        raise Damaged(f"{FILE_NAME} is unreadable ({first_line(e)})") from None
    if not isinstance(content, dict) or content.pop("digest", None) != json_hash(content):
        raise Damaged(f"{FILE_NAME} does not match its own digest")
    if (found := content.get("format")) != FORMAT:
        raise Damaged(f"{FILE_NAME} has format {shown(found)}, this version reads {FORMAT}")
    try:
        return Manifest(**content)
    except TypeError as e:
        raise Damaged(f"{FILE_NAME} has other fields ({first_line(e)})") from None


def check_files(folder: epath.Path, manifest: Manifest) -> None:
    """Compare names and sizes of the files with the manifest. Raises Damaged."""
    present = list_files(folder, manifest.files)
    for name, size in manifest.files.items():
        if present[name] != size:
            found = "is missing" if present[name] is None else f"has {present[name]} bytes"
            raise Damaged(f"{name} {found}, its manifest says {size} bytes")


def list_files(folder: epath.Path, names: Any = None) -> dict[str, int | None]:
    """Size in bytes of each named file below ``folder`` (default: of all); None if missing."""

    def size(name: str) -> int | None:
        try:
            return (folder / name).stat().length
        except FileNotFoundError:
            return None

    if names is None:
        names = sorted(_walk(folder, ""))
    with ThreadPoolExecutor(16) as pool:  # a request to a bucket takes tens of ms
        return dict(zip(names, pool.map(size, names)))


def _walk(folder: epath.Path, prefix: str) -> list[str]:
    names = []
    for entry in folder.iterdir():
        if entry.is_dir():
            names += _walk(entry, f"{prefix}{entry.name}/")
        elif not entry.name.startswith(FILE_NAME):
            names.append(prefix + entry.name)
    return names
