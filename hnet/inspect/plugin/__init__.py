"""The "Boundaries" tab of TensorBoard: the chunks of the texts of every run at every step.

Installed with the package (entry point ``tensorboard_plugins``), without configuration. It finds
the runs below ``--logdir`` (or ``--logdir_spec``) that have a ``boundaries`` folder. It reads only
what a view shows, so the cost does not grow with the number of runs. Local folders only. A response
skips damaged lines and gives their number.
"""

import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from hnet.inspect.index import FOLDER, INDEX, SegmentationIndex
from hnet.inspect.plugin import assets
from hnet.printable import printable

MAX_KEYS = 64
"""maximum number of texts per request"""
_SCAN_SECS = 10.0
_OPEN_RUNS = 32
_SKIPPED = {FOLDER, "checkpoints", "__pycache__"}  # contain no runs, but possibly very many files


class BoundariesPlugin(base_plugin.TBPlugin):
    """Serves the view and its data.

    ``/runs``, ``/run?run=``, ``/view?run=&step=&keys=`` and ``/search?run=&query=``.
    """

    plugin_name = "boundaries"

    def __init__(self, context: base_plugin.TBContext):
        self._roots = _roots(context)
        self._lock = threading.Lock()
        self._scanned_at = float("-inf")
        self._folders: dict[str, str] = {}  # run -> its boundaries folder
        self._open: OrderedDict[str, SegmentationIndex] = OrderedDict()

    def get_plugin_apps(self):
        return {
            "/index.js": self._serve_script,
            "/style.css": self._serve_style,
            "/runs": self._serve_runs,
            "/run": self._serve_run,
            "/view": self._serve_view,
            "/search": self._serve_search,
        }

    def is_active(self) -> bool:
        """Whether any run has segmentations; scans only folder names, at most every 10 s."""
        return bool(self._runs())

    def frontend_metadata(self):
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Boundaries")

    def _runs(self) -> dict[str, str]:
        with self._lock:
            if time.monotonic() - self._scanned_at > _SCAN_SECS:
                self._folders = _named(sorted(_find_runs(self._roots)))
                self._scanned_at = time.monotonic()
            return self._folders

    def _read(self, run: str, read: Callable[[SegmentationIndex], dict]) -> dict | None:
        """Apply `read` to the refreshed index of a run; None for an unknown run.

        The name is looked up among the runs found below the log folder, so a client cannot access
        any other path.
        """
        folder = self._runs().get(run)
        if folder is None:
            return None
        with self._lock:  # TensorBoard serves requests from several threads
            index = self._open.pop(run, None) or SegmentationIndex(folder)
            self._open[run] = index
            if len(self._open) > _OPEN_RUNS:
                self._open.popitem(last=False)
            index.refresh()
            return read(index)

    @wrappers.Request.application
    def _serve_script(self, request):
        return http_util.Respond(request, assets.script(), "text/javascript")

    @wrappers.Request.application
    def _serve_style(self, request):
        return http_util.Respond(request, assets.style(), "text/css")

    @wrappers.Request.application
    def _serve_runs(self, request):
        return http_util.Respond(request, {"runs": list(self._runs())}, "application/json")

    @wrappers.Request.application
    def _serve_run(self, request):
        found = self._read(request.args.get("run", ""), _describe)
        return _answer(request, found)

    @wrappers.Request.application
    def _serve_view(self, request):
        step = request.args.get("step", type=int)
        keys = request.args.get("keys", "").split(",")
        if step is None or len(keys) > MAX_KEYS:
            why = f"give a step and at most {MAX_KEYS} keys"
            return http_util.Respond(request, why, "text/plain", code=400)
        run = request.args.get("run", "")
        return _answer(request, self._read(run, lambda index: {"views": index.read(step, keys)}))

    @wrappers.Request.application
    def _serve_search(self, request):
        query = request.args.get("query", "")
        run = request.args.get("run", "")
        return _answer(request, self._read(run, lambda index: {"keys": index.search(query)}))


def _describe(index: SegmentationIndex) -> dict:
    texts = {key: text.facts() for key, text in index.texts.items()}
    return {"steps": index.steps, "texts": texts, "damaged": index.damaged}


def _answer(request, content: dict | None):
    if content is None:
        return http_util.Respond(request, "no such run", "text/plain", code=404)
    return http_util.Respond(request, content, "application/json")


def _roots(context: base_plugin.TBContext) -> list[tuple[str, str]]:
    """(group name, local path) of each log folder given to TensorBoard."""
    if context.logdir:
        return [("", os.path.expanduser(context.logdir))]
    roots = []
    for part in (getattr(context.flags, "logdir_spec", "") or "").split(","):
        name, colon, path = part.partition(":")
        if not colon or part.startswith("/"):
            name, path = part, part
        if path:
            roots.append((name, os.path.expanduser(path)))
    return roots


def _find_runs(roots: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(name of the run in TensorBoard, boundaries folder) of each run below each root."""
    for group, root in roots:
        for folder in _walk(root):
            path = os.path.relpath(folder, root).replace(os.sep, "/")
            name = "/".join(p for p in (group, path) if p and p != ".")
            yield name or os.path.basename(os.path.realpath(root)), os.path.join(folder, FOLDER)


def _named(runs: list[tuple[str, str]]) -> dict[str, str]:
    """Displayed name -> folder; the suffix /tensorboard is removed if the name stays unique."""
    shown = [printable(name.removesuffix("/tensorboard")) for name, _ in runs]
    count = Counter(shown)
    found: dict[str, str] = {}
    for short, (name, folder) in zip(shown, runs):
        label = long = short if count[short] == 1 else printable(name)
        n = 1
        while label in found:
            n += 1
            label = f"{long} ({n})"
        found[label] = folder
    return found


def _walk(root: str) -> Iterator[str]:
    """Folders with segmentations; each real folder is visited once, so link cycles end."""
    seen, waiting = set(), [root]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        inner = _folders_in(folder)
        if FOLDER in inner and os.path.isfile(os.path.join(folder, FOLDER, INDEX)):
            yield folder
        waiting += (os.path.join(folder, name) for name in inner if name not in _SKIPPED)


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (e.name for e in entries if e.name[0] != "." and _is_folder(e)), reverse=True
            )
    except OSError:
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a broken link
        return False
