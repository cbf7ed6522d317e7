"""Links in the README and other pages exist, lines are short, and the README's Python runs."""

import json
import re
from pathlib import Path

import pytest

from hnet.config import HNetConfig
from hnet.train import loop
from tests.training import TINY, build_once, tiny_run

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


def test_the_tour_runs(tmp_path, monkeypatch, quick_compilation):
    """Every cell, on a configuration that is smaller than its own."""
    cells = json.loads((ROOT / "experiments" / "tour.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 4 and "steps=60" in code[0]
    monkeypatch.chdir(tmp_path)
    own = {"tiny": tiny_run(tmp_path)}
    monkeypatch.setattr("hnet.train.named.base_config", own.__getitem__)
    monkeypatch.setattr(loop, "build", build_once)
    names = {"__name__": "tour"}
    for source in (code[0].replace("steps=60", "steps=3"), *code[1:]):
        exec(compile(source, "tour.ipynb", "exec"), names)
    assert len(names["continued"].text) > 0
    assert names["other"].evaluation.bpb != names["outcome"].evaluation.bpb
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tour", "tour-mlp"]
