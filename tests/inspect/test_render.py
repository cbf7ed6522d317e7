import io
import re
import warnings

import numpy as np
from hypothesis import given
from rich.console import Console

from hnet.inspect.page import to_html
from hnet.inspect.render import (
    MARKS,
    describe,
    print_segmentations,
    to_markdown,
    to_plain,
    to_rich,
)
from hnet.inspect.segmentation import Segmentation, StageBoundaries
from tests.inspect.test_segmentation import routed
from tests.inspect_samples import BROKEN, HOSTILE, TEXTS, probe_texts, segment

with warnings.catch_warnings(action="ignore"):  # TensorBoard's own sanitizer warns when imported
    from tensorboard.plugin_util import markdown_to_safe_html


def cut(data, *stages):
    """A segmentation with the given interior boundaries of each stage."""
    built, count = [], len(data)
    for starts in stages:
        built.append(StageBoundaries((0, *starts), (0.0,) * count))
        count = len(starts) + 1
    return Segmentation(data, "t", tuple(built))


_TOKEN = re.compile(r"\\x(..)|\\u\{(\w+)\}|\\n\n|\\([tr])|\\(.)|(.)", re.DOTALL)


def from_plain(text: str) -> tuple[bytes, tuple[tuple[int, ...], ...]]:
    """Inverse of `to_plain`: (bytes, chunk starts of each stage that has marks)."""
    data, levels = bytearray(), []
    for match in _TOKEN.finditer(text):
        byte, code, blank, literal, char = match.groups()
        if char and char in MARKS:
            levels.append((len(data), MARKS.index(char)))
        elif byte:
            data.append(int(byte, 16))
        elif code:
            data += chr(int(code, 16)).encode()
        elif blank:
            data += {"t": b"\t", "r": b"\r"}[blank]
        else:
            data += (literal or char or "\n").encode()
    depth = 1 + max((level for _, level in levels), default=-1)
    starts = (
        (0, *(offset for offset, level in levels if level >= stage)) for stage in range(depth)
    )
    return bytes(data), tuple(starts)


@given(routed())
def test_plain_text_can_be_read_back(case):
    seg = Segmentation.from_router(*case)
    data, starts = from_plain(to_plain(seg))
    marked = [s.starts for s in seg.stages if len(s.starts) > 1]
    assert (data, list(starts)) == (seg.data, marked)


def test_marks_of_nested_stages():
    assert to_plain(cut(b"abcdef", (1, 3, 5), (3,))) == "a|bc‖de|f"
    assert to_plain(cut(b"abcdef", (1, 3, 5), (3, 5), (5,))) == "a|bc‖de⦀f"


def test_a_boundary_inside_a_character_shows_its_bytes():
    assert to_plain(cut("aé€".encode(), (2, 4))) == r"a\xc3|\xa9\xe2|\x82\xac"
    assert to_plain(cut("aé€".encode(), (1, 3))) == "a|é|€"


def test_nothing_invisible_or_ambiguous_is_left():
    text = "a|b‖c\\d\te\nf\x1b[31m\u202eg\u200dh\x85".encode() + b"\xff"
    shown = to_plain(cut(text))
    assert shown == (
        "a\\|b\\‖c\\\\d\\te\\n\nf\\u{001b}[31m\\u{202e}g\u200dh\\u{0085}\\xff"
    )  # the joiner stays: it shapes its neighbours


def test_pipe_gets_marks_and_terminal_gets_colours():
    seg = cut(b"abcd", (1, 3), (3,))
    piped, terminal = io.StringIO(), io.StringIO()
    print_segmentations([seg], Console(file=piped, width=20))
    print_segmentations(
        [seg], Console(file=terminal, force_terminal=True, color_system="truecolor", width=20)
    )
    assert "a|bc‖d" in piped.getvalue() and "\x1b" not in piped.getvalue()
    assert "\x1b[" in terminal.getvalue() and "a|bc" not in terminal.getvalue()
    no_colour = io.StringIO()
    print_segmentations([seg], Console(file=no_colour, force_terminal=True, no_color=True))
    assert "a|bc‖d" in no_colour.getvalue()


def test_long_lines_are_not_folded():
    out = io.StringIO()
    print_segmentations([cut(b"word " * 99)], Console(file=out, width=20))
    assert "word " * 99 in out.getvalue()


def test_hostile_text_cannot_reach_the_terminal():
    out = io.StringIO()
    seg = Segmentation(BROKEN, "name\x1b]0;x\x07", cut(BROKEN, (3, 9)).stages)
    print_segmentations([seg], Console(file=out, force_terminal=True, color_system="truecolor"))
    rest = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", rest)


def test_chunks_alternate_in_colour():
    spans = to_rich(cut(b"abcd", (1, 3))).spans
    assert [(s.start, s.end) for s in spans] == [(0, 1), (1, 3), (3, 4)]
    assert spans[0].style == spans[2].style != spans[1].style


def test_describe():
    text = describe(cut(b"abcdef", (4,)))
    assert text == "6 bytes; stage 0: 2 chunks, 3.00 bytes per chunk, longest 4"
    assert describe(Segmentation(b"ab", bits=(1.0, 2.5))) == "2 bytes; 1.75 bits per byte"


def test_markdown_shows_text_as_text():
    hostile = HOSTILE + "\n\n# title\n```\n![x](http://e.com/x.png) *a* <script>alert(1)</script>"
    seg = Segmentation(hostile.encode(), hostile, cut(hostile.encode(), (5, 40)).stages)
    page = markdown_to_safe_html(to_markdown(seg))
    assert set(re.findall(r"<(\w+)", page)) <= {"p", "pre", "code", "strong"}
    assert "<pre><code>&lt;img |src=x onerror" in page and "# title" in page


def test_page_is_one_file_that_data_cannot_break():
    rng = np.random.default_rng(0)
    texts = [segment(t, 0.5, rng) for t in probe_texts()]
    page = to_html({"</script><script>alert(1)</script>": texts}, title="<b>")
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<title>&lt;b&gt;</title>" in page and "<img" not in page
    assert not re.search(r'(src|href)\s*=\s*["\']?https?:', page)
    assert "import " not in page.split('type="module">')[1].split("render()")[0]


def test_marks_are_single_characters():
    assert all(len(mark) == 1 for mark in MARKS)
    assert all(mark not in text for mark in MARKS for _, text in TEXTS.values())
