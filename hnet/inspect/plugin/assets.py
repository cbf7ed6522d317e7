"""Script and style sheet of the view, one file each, for TensorBoard and self-contained pages."""

import re
from functools import cache
from importlib.resources import files

_PARTS = (
    "dom.js", "text.js", "draw.js", "strips.js", "picture.js", "export.js", "surroundings.js",
    "card.js", "summary.js", "address.js", "controls.js", "view.js", "source.js",
)  # fmt: skip
_IMPORT = re.compile(r'^import [^;]*? from "\./\w+\.js";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(async )?(function|class|const) )", re.MULTILINE)


def _read(name: str) -> str:
    return (files(__package__) / "static" / name).read_text(encoding="utf-8")


@cache
def script() -> str:
    """All parts as one ES module, each part after the parts it uses; exports only `render`."""
    parts = [_EXPORT.sub("", _IMPORT.sub("", _read(name))) for name in _PARTS]
    return "\n".join([*parts, "export { render };\n"])


@cache
def style() -> str:
    """The style sheet."""
    return _read("style.css")
