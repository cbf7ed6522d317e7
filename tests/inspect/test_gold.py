import json
import tokenize
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hnet.errors import ConfigError
from hnet.inspect import gold
from hnet.inspect.segmentation import Segmentation


@given(st.text(max_size=17))
def test_rules_against_a_walk_through_characters(text):
    offsets = [len(text[:i].encode()) for i in range(len(text))]
    starts = {"characters": [], "words": [], "whitespace": []}
    for i in range(1, len(text)):
        starts["characters"].append(offsets[i])
        if text[i].isspace() != text[i - 1].isspace():
            starts["whitespace" if text[i].isspace() else "words"].append(offsets[i])
    for kind, expected in starts.items():
        assert gold.RULES[kind](text.encode()) == tuple(expected), kind


def test_an_invalid_byte_is_a_unit_of_its_own():
    assert gold.character_starts(b"a\xff\xffb") == (1, 2, 3)


def test_inside_character():
    assert gold.inside_character("aé€".encode(), (1, 2, 3, 4, 5)) == (2, 4, 5)
    assert gold.inside_character(b"\xff\xfe", (1,)) == ()


def test_code_tokens_are_byte_offsets():
    source = "x = 'é'+ y\r\nif x:\n\treturn_(x)  # end\n"
    cut = [0, *gold.code_tokens(source.encode())]
    pieces = [source.encode()[a:b].decode().strip() for a, b in zip(cut, [*cut[1:], None])]
    assert pieces == ["x", "=", "'é'", "+", "y", "if", "x", ":", "return_", "(", "x", ")", "# end"]


def test_code_tokens_of_a_real_file():
    data = Path(tokenize.__file__).read_bytes()
    found = gold.code_tokens(data)
    assert len(found) > 1000
    assert all(not data[o : o + 1].isspace() for o in found)


@pytest.mark.parametrize("source", [b"'open", b"(", b"\xff", b"  a\n b\n"])
def test_code_that_does_not_tokenize_is_refused(source):
    with pytest.raises(ConfigError, match="not Python source"):
        gold.code_tokens(source)


def test_annotate_keeps_what_is_there():
    text = gold.annotate(Segmentation(b"a b", gold={"words": (1,)}), "words", "whitespace")
    assert text.gold == {"words": (1,), "whitespace": (1,)}
    with pytest.raises(ConfigError, match="follows no rule"):
        gold.annotate(text, "syllables")


def test_ud_reader(tmp_path):
    path = tmp_path / "ud.jsonl"
    row = {"id": "s1", "text": "Çay, iç", "spans": [[0, 4], [4, 5], [6, 9]]}
    path.write_text(json.dumps(row) + "\n\n")
    (text,) = gold.read_ud(path)
    assert (text.name, text.data) == ("s1", "Çay, iç".encode())
    assert text.gold == {"words": (4, 6), "word_ends": (4, 5)}
    for bad in ('{"id": 1}', "[1]", "{"):
        path.write_text(bad)
        with pytest.raises(ConfigError, match="line 1"):
            list(gold.read_ud(path))


def test_morph_word_reader(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text(
        "strides\tstride s\t6\texact\t100\tdev\n"
        "incult\tincult\t\texact\t000\tdev\n"
        "évolué\té volu é\t2,6\texact\t110\tdev\n"
        "subneural\tsub neuron al\t3,7\taligned\t010\tdev\n"
        "went\tgo ed\t-\tnone\t100\tdev\n"
    )
    found = {t.name: t.gold["morphemes"] for t in gold.read_morph_words(path)}
    assert found == {"strides": (6,), "incult": (), "évolué": (2, 6)}
    silver = {t.name: t.gold["morphemes"] for t in gold.read_morph_words(path, exact_only=False)}
    assert silver == {**found, "subneural": (3, 7)}
    path.write_text("strides\tstride s\tx\texact\t100\n")
    with pytest.raises(ConfigError, match="line 1"):
        list(gold.read_morph_words(path))
    path.write_text("strides\n")
    with pytest.raises(ConfigError, match="columns"):
        list(gold.read_morph_words(path))


BOM = b"\xef\xbb\xbf"


def test_offsets_do_not_depend_on_byte_order_mark_and_line_ends(tmp_path):
    contents = {
        "a.py": "x = 'é'; y\n",
        "a.words.tsv": "évolué\té volu é\t2,6\texact\n",
        "b.words.tsv": "ab\ta b\t1\texact\n",
        "a.sentences.tsv": "two dogs\ttwo dog @@s\n",
        "a.jsonl": '{"id": "s", "text": "é iç", "spans": [[0, 2], [3, 6]]}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        (expected,) = gold.read_annotated(tmp_path / name)
        for written in (BOM + content.encode(), content.replace("\n", "\r\n").encode()):
            (tmp_path / name.upper()).write_bytes(written)
            (found,) = gold.read_annotated(tmp_path / name.upper())
            assert found.gold == expected.gold
            assert found.data.replace(b"\r", b"") == expected.data
    assert gold.code_tokens(BOM + b"x = 1") == tuple(
        o + 3 for o in (0, *gold.code_tokens(b"x = 1"))
    )


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("Größe zählt", [[0, 5], [6, 11]]),  # offsets in characters, read as bytes
        ("слово и дело", [[0, 5], [6, 7], [8, 12]]),
        ("in Größe zählt", [[0, 2], [3, 8], [9, 14]]),
        ("ab", [[0, 3]]),
        ("ab", [[1, 1]]),
        ("ab", [[-1, 1]]),
    ],
)
def test_spans_that_cannot_be_byte_offsets_of_words(tmp_path, text, spans):
    good = {"text": "Größe, é", "spans": [[0, 7], [7, 8], [9, 11]]}
    bad = {"text": text, "spans": spans}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    with pytest.raises(ConfigError, match="line 2: span .* (is not inside|are UTF-8 byte offsets)"):
        list(gold.read_ud(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("offsets", ["1,5", "9", "0,2"])
def test_morphemes_that_cannot_be_byte_offsets(tmp_path, offsets):
    (tmp_path / "w.tsv").write_text(f"évolué\té volu é\t{offsets}\texact\n")
    with pytest.raises(ConfigError, match="line 1: .* are not UTF-8 byte offsets"):
        list(gold.read_morph_words(tmp_path / "w.tsv"))


def test_annotated_json_is_bytes_and_lines_end_at_line_feeds(tmp_path):
    rows = [
        '{"id": 1, "text": "a\u2028b", "spans": [[0, 5]]}'.encode(),
        b'{"id": 2, "text": "\xff\\ud800 b", "spans": [[0, 4], [5, 6]]}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    first, second = gold.read_annotated(tmp_path / "a.jsonl")
    assert (first.data, first.gold["words"]) == ("a\u2028b".encode(), ())
    assert (second.data, second.gold["words"]) == (b"\xff\xed\xa0\x80 b", (5,))
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="line 1: it is nested too deeply"):
        list(gold.read_annotated(tmp_path / "deep.jsonl"))
    cut = Segmentation("a\u2028b".encode(), "s").to_json()
    text = json.dumps(cut, ensure_ascii=False).encode()
    (tmp_path / "cut.jsonl").write_bytes(BOM + text + b"\r\n" + text)
    assert [s.data for s in gold.read_annotated(tmp_path / "cut.jsonl")] == [first.data] * 2


def test_morph_sentence_reader_leaves_out_what_is_not_exact(tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text(
        "two dogs réads .\ttwo dog @@s réad @@s .\tdev\n" + "he ran .\the run @@ed .\tdev\n"
    )
    (text,) = gold.read_morph_sentences(path)
    assert text.gold == {"words": (4, 9, 16), "morphemes": (4, 7, 9, 14, 16)}
    cut = [0, *text.gold["morphemes"], len(text.data)]
    assert [text.data[a:b].decode().strip() for a, b in zip(cut, cut[1:])] == [
        "two", "dog", "s", "réad", "s", ".",
    ]  # fmt: skip


def test_code_reader(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"path": "b.py", "text": "y=2"}) + "\n")
    (a,), (b,) = gold.read_code(tmp_path / "a.py"), gold.read_code(tmp_path / "b.jsonl")
    assert (a.name, a.gold) == ("a.py", {"code_tokens": (2, 4)})
    assert (b.name, b.gold) == ("b.py", {"code_tokens": (1, 2)})
    with pytest.raises(ConfigError, match="No such file"):
        list(gold.read_code(tmp_path / "none.py"))


def test_annotated_files_are_told_apart(tmp_path):
    segmented = Segmentation(b"ab c", "s", gold={"words": (3,)})
    contents = {
        "a.py": "x = 1\n",
        "code.jsonl": json.dumps({"path": "b.py", "text": "y=2"}),
        "CODE.JSONL": json.dumps({"path": "c.py", "text": "y=2"}),
        "ud.jsonl": json.dumps({"id": 1, "text": "a b", "spans": [[0, 1], [2, 3]]}),
        "cut.jsonl": json.dumps(segmented.to_json()),
        "w.words.tsv": "evler\tev ler\t2\texact\n",
        "s.sentences.tsv": "dogs .\tdog @@s .\n",
    }
    found = {}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        (found[name],) = gold.read_annotated(tmp_path / name)
    assert found["cut.jsonl"] == segmented
    assert {name: dict(seg.gold) for name, seg in found.items()} == {
        "a.py": {"code_tokens": (2, 4)},
        "code.jsonl": {"code_tokens": (1, 2)},
        "CODE.JSONL": {"code_tokens": (1, 2)},
        "ud.jsonl": {"words": (2,), "word_ends": (1,)},
        "cut.jsonl": {"words": (3,)},
        "w.words.tsv": {"morphemes": (2,)},
        "s.sentences.tsv": {"words": (5,), "morphemes": (3, 5)},
    }


def test_clipping_keeps_whole_characters_and_the_gold_inside():
    seg = Segmentation("aé€b".encode(), "x", gold={"words": (1, 3, 6)})
    clipped = [gold.clip(seg, n) for n in range(1, 8)]
    assert [c.data.decode() for c in clipped] == ["a", "a", "aé", "aé", "aé", "aé€", "aé€b"]
    assert [c.gold["words"] for c in clipped] == [(), (), (1,), (1,), (1,), (1, 3), (1, 3, 6)]


def test_thinning_spreads_evenly():
    assert gold.thin("abcdefg", 3) == ["a", "c", "e"]
    assert gold.thin("abc", 0) == gold.thin("abc", 9) == ["a", "b", "c"]
    assert gold.thin("", 3) == []
