"""The default corpus: the documentation of the installed Python.

About 2 MB of English prose: the language reference by topic (``pydoc_data.topics``) and the
docstrings of the standard library, each under the name that it documents. Source code is left out:
it is so repetitive that general-purpose compressors do better on it, and word boundaries cannot be
judged on it. Only ``pydoc_data`` is imported; the rest is parsed, not executed. The result is the
same on every machine with the same Python release.
"""

import ast
import hashlib
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from hnet.data.shards import replace_file
from hnet.errors import ConfigError

NAME = "python:"
"""entry of ``data.files`` that names this corpus"""

# Tests, word lists, and modules that some distributions of Python leave out.
_LEFT_OUT = frozenset(
    "__pycache__ config dist-packages distutils encodings ensurepip idlelib lib-dynload lib2to3 "
    "pydoc_data site-packages test tests tkinter turtledemo".split()
)
_LEFT_OUT_FILES = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize")
_OWN_PAGE_FROM = 1000
_SMALLEST_PAGE = 100
_LONGEST_PAGE = 8000
_REPEATABLE = 60  # longest paragraph that may occur again, in characters; e.g. "See the manual."
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def documents() -> Iterable[tuple[str, bytes]]:
    """(name, text) of `parsed_documents`, kept in the folder of the compilation cache.

    To parse the sources takes seconds. Kept text is used if Python's release and the name, size and
    time of each source file are as they were, and if this module is.
    """
    from hnet.runtime.compile_cache import default_cache_path  # loads JAX

    root = Path(sysconfig.get_paths()["stdlib"])
    known = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16)
    known.update(repr((sys.version, str(root))).encode())
    for path in sorted(_modules(root)) + sorted(root.glob("pydoc_data/*.py")):
        status = path.stat()
        known.update(repr((str(path), status.st_size, status.st_mtime_ns)).encode())
    kept = Path(default_cache_path(), f"python-{known.hexdigest()}.json")
    try:
        return [(str(name), text.encode()) for name, text in json.loads(kept.read_bytes())]
    except (OSError, ValueError, TypeError, AttributeError):
        found = list(parsed_documents())
    try:  # without a folder to write to, the next start parses again
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, json.dumps([(name, text.decode()) for name, text in found]).encode())
    except OSError:
        pass
    return found


def parsed_documents() -> Iterator[tuple[str, bytes]]:
    """Yield (name, text): one page per topic, per module, and per class with long documentation.

    Long pages are split between paragraphs, so that the held-out part contains many different
    pages. Only the first occurrence of a repeated paragraph is kept, so that no paragraph is both
    trained on and held out. Raises ConfigError when Python is installed without its source.
    """
    seen: set[str] = set()
    for topic, text in sorted(_topics().items()):
        yield from _cut(f"{NAME}topics.{topic}", _unseen(text, seen))
    root = Path(sysconfig.get_paths()["stdlib"])
    pages = 0
    for path in sorted(_modules(root)):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for name, text in _pages(module, path.read_bytes(), seen):
            pages += 1
            yield from _cut(NAME + name, text)
    if not pages:
        raise ConfigError(
            f"data.files is empty, and the default text, the standard library's source, is not "
            f"in {str(root)!r}: name text files with --data.files"
        )


def _cut(name: str, text: str) -> Iterator[tuple[str, bytes]]:
    page, size, number = [], 0, 0
    for paragraph in text.split("\n\n"):
        if page and size + len(paragraph) > _LONGEST_PAGE:
            number += 1
            yield f"{name}({number})", "\n\n".join(page).encode()
            page, size = [], 0
        page.append(paragraph)
        size += len(paragraph) + 2
    yield f"{name}({number + 1})" if number else name, "\n\n".join(page).encode()


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return {}
    return topics


def _modules(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s.split("-")[0] not in _LEFT_OUT | {"site"}]
        for name in names:
            if name.endswith(".py") and not name.startswith(_LEFT_OUT_FILES):
                yield Path(folder, name)


def _pages(module: str, source: bytes, seen: set[str]) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old docstrings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    entries = [_entry(module, tree, seen)]
    own_pages = []
    for node in _definitions(tree):
        text = "\n\n".join(_entries(node, seen))
        if isinstance(node, ast.ClassDef) and len(text) >= _OWN_PAGE_FROM:
            own_pages.append((f"{module}.{node.name}", text))
        else:
            entries.append(text)
    text = "\n\n".join(e for e in entries if e)
    if len(text) >= _SMALLEST_PAGE:
        yield module, text
    yield from own_pages


def _entries(node: _Definition, seen: set[str]) -> Iterator[str]:
    """Yield the entry of a function or class, then the entries of the definitions inside it."""
    bases = node.bases if isinstance(node, ast.ClassDef) else node.args
    arguments = (
        ", ".join(map(ast.unparse, bases)) if isinstance(bases, list) else ast.unparse(bases)
    )
    if entry := _entry(f"{node.name}({arguments})", node, seen):
        yield entry
    for inner in _definitions(node):
        yield from _entries(inner, seen)


def _entry(heading: str, node: _Definition | ast.Module, seen: set[str]) -> str:
    text = _unseen(ast.get_docstring(node) or "", seen)
    return f"{heading}\n{text}" if text else ""


def _unseen(text: str, seen: set[str]) -> str:
    """The text without paragraphs that were seen before; short paragraphs may repeat."""
    kept = []
    for paragraph in text.strip().split("\n\n"):
        words = " ".join(paragraph.split())
        if words not in seen:
            kept.append(paragraph)
        if len(words) > _REPEATABLE:
            seen.add(words)
    return "\n\n".join(kept)


def _definitions(node: _Definition | ast.Module) -> Iterator[_Definition]:
    return (child for child in node.body if isinstance(child, _Definition))
