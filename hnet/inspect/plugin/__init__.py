"""The "Boundaries" tab of TensorBoard: texts of every run cut into the chunks of every step.

Installed with the package (entry point ``tensorboard_plugins``); nothing to configure. It finds
the runs below ``--logdir`` (or ``--logdir_spec``) that have a ``boundaries`` folder and reads no
more of them than a view shows, so a hundred runs cost what one does. Local folders only.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from hnet.inspect.plugin import assets
from hnet.inspect.store import FOLDER, INDEX, SegmentationIndex

MAX_KEYS = 64
"""texts a request may ask for"""
_SCAN_SECS = 10.0
_OPEN_RUNS = 32
_SKIPPED = {FOLDER, "checkpoints", "__pycache__"}  # never hold runs, may hold very many files


class BoundariesPlugin(base_plugin.TBPlugin):
    """Serves the view and its data: ``/runs``, ``/run?run=`` and ``/view?run=&step=&keys=``."""

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
        }

    def is_active(self) -> bool:
        """Whether any run has segmentations: looks at folder names only, and rarely."""
        return bool(self._runs())

    def frontend_metadata(self):
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Boundaries")

    def _runs(self) -> dict[str, str]:
        with self._lock:
            if time.monotonic() - self._scanned_at > _SCAN_SECS:
                self._folders = dict(sorted(_find_runs(self._roots)))
                self._scanned_at = time.monotonic()
            return self._folders

    def _read(self, run: str, read: Callable[[SegmentationIndex], dict]) -> dict | None:
        """What `read` takes from a run's index, brought up to date; None for an unknown run.

        The run's name is only ever looked up among those found below the log folder, so a client
        cannot name another path.
        """
        folder = self._runs().get(run)
        if folder is None:
            return None
        with self._lock:  # TensorBoard serves from several threads
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


def _describe(index: SegmentationIndex) -> dict:
    shown = ("name", "bytes", "routes", "gold")
    texts = {key: {field: text[field] for field in shown} for key, text in index.texts.items()}
    return {"steps": index.steps, "texts": texts}


def _answer(request, content: dict | None):
    if content is None:
        return http_util.Respond(request, "no such run", "text/plain", code=404)
    return http_util.Respond(request, content, "application/json")


def _roots(context: base_plugin.TBContext) -> list[tuple[str, str]]:
    """(group name, local path) of what TensorBoard was pointed at."""
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
    """(run name, boundaries folder) below each root, named as TensorBoard names runs."""
    for group, root in roots:
        for folder in _walk(root, set()):
            path = os.path.relpath(folder, root).replace(os.sep, "/")
            yield (
                "/".join(p for p in (group, path) if p and p != ".") or ".",
                os.path.join(folder, FOLDER),
            )


def _walk(folder: str, seen: set[str]) -> Iterator[str]:
    """Folders that hold segmentations; links are followed once, so that a cycle ends."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            inner = [e for e in entries if e.name[0] != "." and e.is_dir()]
    except OSError:
        return
    for entry in inner:
        if entry.name == FOLDER and os.path.exists(os.path.join(entry.path, INDEX)):
            yield folder
        elif entry.name not in _SKIPPED:
            yield from _walk(entry.path, seen)
