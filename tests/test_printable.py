import os
import re

from hypothesis import given
from hypothesis import strategies as st

from experiments import boundaries
from experiments.scaling import __main__ as scaling
from hnet.commands import evaluate
from hnet.printable import JOINERS, printable
from hnet.suites import command
from hnet.sweep.space import describe
from hnet.train.live_line import LiveLine


def test_what_steers_a_terminal_or_turns_text_is_written_as_its_number():
    assert printable("run\x1b[2J\u202egnp.exe\u2028x\x85") == (
        "run\\u{001b}[2J\\u{202e}gnp.exe\\u{2028}x\\u{0085}"
    )
    assert printable("a\nb\tc\r") == "a\\nb\\tc\\r"
    assert printable("a\nb\tc", keep="\n") == "a\nb\\tc"
    assert printable("می\u200cخواهم", keep=JOINERS) == "می\u200cخواهم"


def test_bytes_of_a_file_name_that_are_no_utf8():
    shown = printable(os.fsdecode(b"caf\xe9\xff"))
    assert shown == "caf\\xe9\\xff"
    shown.encode()  # can be printed


def test_what_has_a_shape_stays():
    for text in ("plain", "Größe 日本語 हिन्दी עברית 😀", "a b\\c", ""):
        assert printable(text) == text
    assert printable(3) == "3"


@given(st.text(st.characters()))
def test_one_line_without_control_characters(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", shown)
    shown.encode()


RAW = "a\x1b[31m\u202e\nb"


def test_names_from_outside_are_escaped_in_lines_and_tables(capsys):
    score = {"bpb": 1.0, "bytes": 3}
    report = score | {"unscored_bytes": 0, "bytes_per_chunk": [2.0], "files": {RAW: score}}
    report |= {"positions_per_chunk": [{RAW: 2.0}], "documents": {RAW: score}}
    evaluate._print(report, with_documents=True)
    command.print_reports({"suite": {RAW: [{RAW: RAW}]}})
    LiveLine(1, 0).say(RAW)
    print(describe({"data.files": RAW}))
    told = capsys.readouterr().out
    assert not set(RAW[1:]) & set(told) - set("[31mb\n")
    assert told.count("a\\u{001b}[31m\\u{202e}\\nb") == 8


def test_no_name_from_outside_is_markup(capsys):
    kind = "[/b]" + RAW
    scores = dict.fromkeys(("precision", "recall", "f1"), 0.5)
    stage = {
        "gold": {kind: dict.fromkeys(("learned", "random", "fixed_stride"), scores)},
        "chunk_bytes": dict.fromkeys(("mean", "p5", "p50", "p95", "longest"), 1.0),
        "enrichment": {"bq": None, "z": None},
        "utf8_split_frac": 0.0,
        "undecided_frac": 0.0,
        "classes": {},
    }
    boundaries._print("[/i]", {"texts": 1, "bytes": 3, "stages": [stage]})
    scaling.console.print("[/i]")
    told = capsys.readouterr().out
    assert told.count("[/i]") == 2 and "[/b]a\\u{001b}" in told
