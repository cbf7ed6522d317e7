import hypothesis.strategies as st
import pytest
from hypothesis import given

from hnet.errors import ConfigError
from hnet.inspect.lexical import (
    CLASSES,
    Share,
    Tally,
    chunk_class,
    lexicon_shares,
    read_lexicon,
    turkish_lower,
    vocabulary_report,
)


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        ("a", "char_alpha"), ("é", "char_alpha"), ("7", "char_other"), (" ", "char_other"),
        (" the", "spaced_alpha"), (" दीप", "spaced_alpha"), (" 42", "spaced_other"),
        (" aя", "spaced_other"), ("  ", "spaced_other"), ("ing", "inner_alpha"),
        ("in g", "inner_other"), ("x1", "inner_other"), ("<eos>", "control"), ("[PAD]", "control"),
        (b"\xc3", "pure_byte"), (b"\xa9", "pure_byte"), (b"\x82\xac", "pure_byte"),
        (b"\xe2\x82", "pure_byte"), (b"\xa9 caf", "unicode_flank"), (b"caf\xc3", "unicode_flank"),
        (b"\xa9caf\xe2\x82", "unicode_flank"), (b"a\xffb", "error"), (b"\xff", "error"),
        (b"a\xc3b", "error"), (b"\xc3\xc3", "error"),
    ],
)  # fmt: skip
def test_classes(chunk, expected):
    assert chunk_class(chunk if isinstance(chunk, bytes) else chunk.encode()) == expected


@given(st.text(min_size=2, max_size=7), st.data())
def test_every_piece_of_valid_text_has_a_class_that_is_no_error(text, data):
    whole = text.encode()
    a = data.draw(st.integers(0, len(whole) - 1))
    b = data.draw(st.integers(a + 1, len(whole)))
    assert chunk_class(whole[a:b]) in set(CLASSES) - {"error"}


def test_types_and_occurrences_are_told_apart():
    report = vocabulary_report([b" the", b" the", b" cat", "кот".encode(), b"", "catя".encode()])
    assert report.total == Tally(4, 5)
    assert report.classes["spaced_alpha"] == Tally(2, 3)
    assert report.classes["inner_alpha"] == Tally(1, 1)
    assert set(report.classes) == set(CLASSES)
    assert report.scripts == {
        "CYRILLIC": Tally(1, 1), "LATIN": Tally(2, 3), "Mixed": Tally(1, 1),
    }  # fmt: skip
    assert sum(t.occurrences for t in report.classes.values()) == 5


def test_turkish_lower_case():
    assert turkish_lower("ISPARTA İZMİR") == "ısparta izmir"


def test_lexicon_file(tmp_path):
    path = tmp_path / "lexicon.tsv"
    path.write_text("evler\tev ler\t2\texact\n\nde\n", encoding="utf-8")
    assert read_lexicon(path) == ({"evler", "de"}, {"ev", "ler"})
    path.write_bytes(b"\xef\xbb\xbf" + "evler\tev ler\r\n\r\nde\x85\u2028\r\n".encode())
    assert read_lexicon(path) == ({"evler", "de"}, {"ev", "ler"})
    path.write_text("ev\u2028de\n", encoding="utf-8")  # one line, as for every reader here
    assert read_lexicon(path)[0] == {"ev\u2028de"}
    with pytest.raises(ConfigError, match="none.tsv"):
        read_lexicon(tmp_path / "none.tsv")


def test_turkish_shares():
    chunks = [b" Ev", b" ev", b"ler", b"qx", b"qx", b"\xc3"]
    shares = lexicon_shares(chunks, words=["ev", "evler"], morphemes=["EV", "ler"])
    assert shares.words == Share(2 / 5, 2 / 6)
    assert shares.pure == Share(3 / 5, 3 / 6)
    assert lexicon_shares([], ["ev"], ["ev"]).words == Share(0, 0)
