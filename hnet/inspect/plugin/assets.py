"""The view's script and style, as one file each: for TensorBoard and for self-contained pages."""

import re
from functools import cache
from importlib.resources import files

_PARTS = ("text.js", "draw.js", "card.js", "surroundings.js", "view.js", "source.js")
_IMPORT = re.compile(r'^import [^;]*? from "\./\w+\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(async )?(function|class|const) )", re.MULTILINE)


def _read(name: str) -> str:
    return (files(__package__) / "static" / name).read_text(encoding="utf-8")


@cache
def script() -> str:
    """One ES module of all parts, each behind those it uses; it exports `render` alone."""
    parts = [_EXPORT.sub("", _IMPORT.sub("", _read(name))) for name in _PARTS]
    return "\n".join([*parts, "export { render };\n"])


@cache
def style() -> str:
    """The style sheet."""
    return _read("style.css")
