"""Links in the README and other pages exist, lines are short, and the README's Python runs."""

import re
from pathlib import Path

import pytest

from hnet.config import HNetConfig
from tests.training import TINY

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    p for p in ROOT.rglob("*.md") if not any(part.startswith(".") for part in p.parts[-3:])
)


def prose(page: Path) -> list[str]:
    """Lines outside of code and tables."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.S | re.M)
    return [line for line in text.splitlines() if not line.lstrip().startswith("|")]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere_and_lines_are_short(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    assert [line for line in prose(page) if len(line) > 120 and "](" not in line] == []


def test_python_of_readme_runs(monkeypatch):
    monkeypatch.setattr(HNetConfig, "named", classmethod(lambda cls, name: TINY))
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
