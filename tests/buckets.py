"""An object store in memory that stands for every gs:// path, here and in Orbax."""

from etils.epath.backend import fsspec_backend
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    """Folders exist only as parts of names; there is no atomic rename."""

    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("gs://"))


def empty_bucket(monkeypatch) -> Bucket:
    """A bucket without files, until the test ends."""
    files = Bucket()
    files.store.clear()
    monkeypatch.setattr(type(fsspec_backend), "_get_filesystem", lambda *_: files)
    return files
