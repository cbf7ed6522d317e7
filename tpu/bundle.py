"""The code of this checkout as one archive with a hash, for hosts without a shared file system."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("hnet", "experiments", "tpu", "pyproject.toml", "README.md", "LICENSE")


def shipped_files(root: Path = ROOT) -> list[Path]:
    """Files that a host needs, committed or not, relative to `root` and sorted."""
    files: list[Path] = []
    for name in SHIPPED:
        path = root / name
        files += path.rglob("*") if path.is_dir() else [path] if path.exists() else []
    relative = (f.relative_to(root) for f in files if f.is_file())
    return sorted(
        f
        for f in relative
        if "__pycache__" not in f.parts and not any(p.startswith(".") for p in f.parts)
    )


def code_hash(root: Path = ROOT) -> str:
    """16 hex digits that change with any shipped path or content."""
    digest = hashlib.sha256()
    for file in shipped_files(root):
        content = (root / file).read_bytes()
        digest.update(f"{file.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def config_hash(command: Sequence[str]) -> str:
    """16 hex digits that change with the command and the JSON files that it names."""
    files = [word for word in command if word.endswith(".json") and os.path.isfile(word)]
    contents = [Path(file).read_bytes().hex() for file in files]
    return hashlib.sha256(json.dumps([list(command), contents]).encode()).hexdigest()[:16]


def write_bundle(path: Path, root: Path = ROOT) -> None:
    """Write the shipped files and CODE_HASH as .tar.gz; equal content gives equal bytes."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:

        def add(name: str, content: bytes, mode: int):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))

        for file in shipped_files(root):
            mode = 0o755 if (root / file).stat().st_mode & 0o100 else 0o644
            add(file.as_posix(), (root / file).read_bytes(), mode)
        add("CODE_HASH", f"{code_hash(root)}\n".encode(), 0o644)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(plain.getvalue(), mtime=0))


def archived_hash(path: Path) -> str:
    """The hash that `write_bundle` put into an archive."""
    with tarfile.open(path) as archive:
        return archive.extractfile("CODE_HASH").read().decode().strip()
