"""Script ids against a slow loop over Python's own decoder, and the table against its source."""

import codecs
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hnet.data import script_table, scripts
from hnet.data.script_table import TABLE_FILE, make_table, read_table
from hnet.data.scripts import (
    SCRIPTS,
    START_STATE,
    route_table,
    script_ids,
    script_ids_of_rows,
    script_step,
)
from hnet.errors import ConfigError

TABLE_TEXT = TABLE_FILE.read_text(encoding="utf-8")
SCRIPT_OF = read_table(TABLE_TEXT)[1]
SURROGATES = range(0xD800, 0xE000)


def slow_ids(data: bytes) -> list[int]:
    """The definition: decode byte by byte, remember the last character with a script."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    script_id, ids = 0, []
    for byte in data:
        for character in decoder.decode(bytes([byte])):
            script_id = int(SCRIPT_OF[ord(character)]) or script_id
        ids.append(script_id)
    return ids


def names(data: bytes) -> list[str]:
    return [SCRIPTS[i] for i in script_ids(data)[0]]


# One sample character of every script, beside Common and Inherited ones of every UTF-8 length.
SAMPLES = [chr(int(np.flatnonzero(SCRIPT_OF == i)[-1])) for i in range(1, len(SCRIPTS))]
WEAK = [*" 0.\n", "\u00a0", "\u0301", "\u3001", "\u200d", "\ufe0f", "\U0001f600", "\U000e0101"]
MALFORMED = [
    *(b"\xc0\x80", b"\xc1\xbf", b"\xe0\x80\x80", b"\xe0\x9f\xbf", b"\xf0\x80\x80\x80"),  # overlong
    *(b"\xf0\x8f\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf8\x88\x80\x80\x80"),
    *(b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\x80", b"\xbf\xbf", b"\xfe", b"\xff"),  # surrogates, ...
]
characters = st.one_of(st.sampled_from(SAMPLES), st.sampled_from(WEAK), st.characters()).map(
    lambda c: c.encode("utf-8", "surrogatepass")
)
truncated = st.builds(lambda c, n: c[:n], characters, st.integers(1, 3))
texts = st.lists(
    st.one_of(characters, truncated, st.sampled_from(MALFORMED), st.binary(max_size=4)), max_size=30
).map(b"".join)


@pytest.fixture(params=[scripts._BLOCK_LEN, 5])
def block_len(request, monkeypatch):
    monkeypatch.setattr(scripts, "_BLOCK_LEN", request.param)


def test_each_byte_carries_the_script_of_the_text_so_far():
    assert names("1é".encode()) == ["Common"] * 2 + ["Latin"]
    assert names("aяz".encode()) == ["Latin", "Latin", "Cyrillic", "Latin"]
    assert names("日 ー?".encode()) == ["Common"] * 2 + ["Han"] * 6
    assert names("ひ\u0301カ".encode()) == ["Common"] * 2 + ["Hiragana"] * 5 + ["Katakana"]
    assert names("a🙂𐌰".encode()) == ["Latin"] * 8 + ["Gothic"]
    assert names("я\ue000".encode()) == ["Common"] + ["Cyrillic"] * 3 + ["Unknown"]


def test_malformed_bytes_change_nothing():
    for broken in MALFORMED:
        assert names(b"a" + broken + b"1") == ["Latin"] * (len(broken) + 2)
        assert names(broken + "я".encode())[-2:] == ["Common", "Cyrillic"]
    # A byte that breaks a sequence starts a new one.
    assert names(b"\xe3\x81\xd1\x8f") == ["Common"] * 3 + ["Cyrillic"]
    assert names(b"\xf0\x90\x8ca\xb0") == ["Common"] * 3 + ["Latin"] * 2


def test_every_code_point():
    code_points = np.setdiff1d(np.arange(0x110000), np.array(SURROGATES))
    np.random.default_rng(0).shuffle(code_points)  # neighbours of different scripts
    text = "".join(map(chr, code_points))
    expected, script_id = np.zeros(len(text.encode()), np.uint8), 0
    at = 0
    for character in text:
        length = len(character.encode())
        expected[at : at + length - 1] = script_id
        script_id = SCRIPT_OF[ord(character)] or script_id
        expected[at + length - 1] = script_id
        at += length
    ids, _ = script_ids(text.encode())
    np.testing.assert_array_equal(ids, expected)
    assert set(ids) | {0} == set(range(len(SCRIPTS)))


def test_every_window_at_the_bounds_of_the_forms():
    bounds = bytes.fromhex("00 7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5")
    windows = np.stack(np.meshgrid(*[np.frombuffer(bounds, np.uint8)] * 4, indexing="ij"), -1)
    windows = windows.reshape(-1, 4)
    windows = windows[windows[:, 0] >= 0xC0]  # with other first bytes it is a shorter form
    state = np.zeros(len(windows), np.uint32)
    for byte in windows.T:
        state, ids = script_step(state, byte)
    expected = [slow_ids(window.tobytes())[-1] for window in windows]
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.usefixtures("block_len")
@given(data=texts)
@example(data=b"")
def test_equals_the_slow_loop(data):
    ids, state = script_ids(data)
    assert ids.dtype == np.uint8 and ids.tolist() == slow_ids(data)
    by_steps, one_by_one = np.uint32(START_STATE), []
    for byte in data:
        by_steps, script_id = script_step(by_steps, np.int64(byte))
        one_by_one.append(int(script_id))
    assert one_by_one == slow_ids(data) and by_steps == state


@pytest.mark.usefixtures("block_len")
@given(data=texts, cuts=st.lists(st.integers(0, 60), max_size=4))
def test_parts_give_the_ids_of_the_whole(data, cuts):
    whole, end_state = script_ids(data)
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    state, parts = 0, []
    for first, end in zip(bounds, bounds[1:]):
        ids, state = script_ids(data[first:end], state)
        parts.append(ids)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert state == end_state


@given(data=texts, other=texts, at=st.integers(0, 60))
def test_later_bytes_change_no_id(data, other, at):
    changed = data[:at] + other
    n = min(at, len(data))
    np.testing.assert_array_equal(script_ids(data)[0][:n], script_ids(changed)[0][:n])


def test_step_in_a_compiled_loop_equals_the_pipeline():
    rng = np.random.default_rng(0)
    pieces = [*(c.encode() for c in SAMPLES + WEAK), *MALFORMED, b"\xe3", b"\xf0\x90"]
    rows = [b"".join(pieces[i] for i in rng.integers(0, len(pieces), 97))[:97] for _ in range(5)]
    bytes_BL = np.stack([np.frombuffer(row, np.uint8) for row in rows])

    @jax.jit
    def generate(bytes_LB):
        start = jnp.zeros(5, jnp.uint32)
        return jax.lax.scan(script_step, start, bytes_LB)

    state_B, ids_LB = generate(bytes_BL.T.astype(np.int32))
    assert state_B.dtype == jnp.uint32 and ids_LB.dtype == jnp.uint8
    for b, row in enumerate(rows):
        ids, state = script_ids(row)
        np.testing.assert_array_equal(ids_LB[:, b], ids)
        assert int(state_B[b]) == state


def test_step_with_only_one_traced_argument():
    none, lead, end = np.zeros(1, np.uint32), np.array([0xD1]), np.array([0x8F])
    state, _ = jax.jit(lambda byte: script_step(none, byte))(lead)
    _, ids = jax.jit(lambda state: script_step(state, end))(state)
    assert SCRIPTS[int(ids[0])] == "Cyrillic"


def test_step_takes_values_that_are_no_bytes():
    state, _ = script_step(np.zeros(3, np.uint32), np.array([0xD1, 0xD1, 0xD1]))
    _, ids = script_step(state, np.array([0x8F, 0x18F, -0x71]))  # equal in their low eight bits
    assert [SCRIPTS[i] for i in ids] == ["Cyrillic", "Common", "Common"]


def pack(documents, L):
    """Documents one after another in rows of L, each with its segment id; (ids expected too)."""
    flat = [
        (byte, n + 1, i)
        for n, document in enumerate(documents)
        for byte, i in zip(document, slow_ids(document))
    ]
    flat += [(0, 0, 0)] * (-len(flat) % L)
    return (np.array(column).reshape(-1, L) for column in zip(*flat))


@pytest.mark.usefixtures("block_len")
@given(documents=st.lists(texts.filter(len), min_size=1, max_size=5), L=st.sampled_from([3, 7, 23]))
@example(documents=[b"\xd1", b"\x8f", b"a\xe3\x81", b"\x82", b"1"], L=3)
def test_rows_restart_at_each_document_and_carry_on_by_state(documents, L):
    input_ids_BL, segment_ids_BL, expected_BL = pack(documents, L)
    state, segment = np.uint32(0), 0
    for row, segments, expected in zip(input_ids_BL, segment_ids_BL, expected_BL):
        state_1 = np.array([state if segments[0] == segment else 0])
        ids, (state,) = script_ids_of_rows(row[None], segments[None], state_1)
        segment = segments[-1]
        np.testing.assert_array_equal(ids[0], expected)
    # All rows at once: a row knows nothing of the one before.
    flat_ids, _ = script_ids_of_rows(input_ids_BL.reshape(1, -1), segment_ids_BL.reshape(1, -1))
    np.testing.assert_array_equal(flat_ids.reshape(-1, L), expected_BL)
    ids_BL, state_B = script_ids_of_rows(input_ids_BL, segment_ids_BL)
    for b in range(len(ids_BL)):
        ids, state = script_ids_of_rows(input_ids_BL[b : b + 1], segment_ids_BL[b : b + 1])
        np.testing.assert_array_equal(ids_BL[b], ids[0])
        assert state_B[b] == state[0]


def test_rows_ignore_what_is_no_text():
    row = np.array([[254, *"я1".encode(), 255, 254, ord("1"), 0xD1, 0x161, 0x8F, 255, 97, 98]])
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0, 0]])
    ids, _ = script_ids_of_rows(row, segments)
    assert [SCRIPTS[i] for i in ids[0]] == ["Common"] * 2 + ["Cyrillic"] * 3 + ["Common"] * 8
    ids, state = script_ids_of_rows(np.zeros((2, 0), int), np.zeros((2, 0), int))
    assert ids.shape == (2, 0) and state.tolist() == [0, 0]


def test_script_ids_takes_bytes_only():
    for wrong in (np.zeros(3, np.int32), np.zeros((2, 3), np.uint8), "text", [1, 2]):
        with pytest.raises(TypeError):
            script_ids(wrong)


def test_routes():
    route_of = route_table([["Cyrillic"], ["Han", "Hiragana", "Katakana"]])
    ids, _ = script_ids("1aя日".encode())
    assert route_of[ids].tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert route_of.sum() == 1 + 2 * 3 and not route_table([]).any()


@pytest.mark.parametrize(
    "groups, words",
    [
        ([["Latin"], ["Latn"]], ["routes.1", "'Latn'", "'Latin'"]),
        ([["old_italic"]], ["routes.0", "'old_italic'", "'Old_Italic'"]),
        ([["HAN"]], ["routes.0", "'HAN'", "'Han'"]),
        ([["Inherited"]], ["routes.0", "'Inherited'", "leave it out"]),
        ([["Han", "Thai"], ["Lao", "Thai"]], ["routes.1", "'Thai'", "group 0"]),
        ([["Han", "Han"]], ["routes.0", "'Han'", "once"]),
        ([[]], ["routes.0", "[]"]),
        (["Latin"], ["routes.0", "'Latin'", "('Latin',)"]),
        ([[7]], ["routes.0", "7"]),
    ],
)
def test_bad_groups(groups, words):
    with pytest.raises(ConfigError) as caught:
        route_table(groups, "routes")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)


def test_table_is_that_of_the_library():
    library = pytest.importorskip("fontTools.unicodedata")
    old, new = script_table.unicode_version(TABLE_TEXT), script_table.library_version()
    _, library_script_of = read_table(make_table(SCRIPTS))
    known = (SCRIPT_OF != 1) & (library_script_of != 1)
    assert np.mean(SCRIPT_OF[known] == library_script_of[known]) > 0.999  # whichever the version
    edges = np.flatnonzero(np.diff(SCRIPT_OF))
    if old != new:
        pytest.skip(f"the table is of Unicode {old}, the library of {new}")
    assert make_table(SCRIPTS) == TABLE_TEXT
    for code_point in [*edges, *(edges + 1), *range(0, 0x110000, 101)]:
        name = library.script_name(library.script(chr(code_point)))
        name = name.replace(" ", "_").replace("Inherited", "Common")
        assert name.lower() == SCRIPTS[SCRIPT_OF[code_point]].replace("-", "_").lower()


def test_a_new_table_keeps_the_ids(tmp_path, monkeypatch, capsys):
    pytest.importorskip("fontTools")
    older = [line for line in TABLE_TEXT.splitlines(True) if not line.startswith(("Han ", "Thai "))]
    table = tmp_path / "script_table.txt"
    table.write_text("".join(older), encoding="utf-8")
    monkeypatch.setattr(script_table, "TABLE_FILE", table)
    assert script_table.main() == 0
    kept, script_of = read_table(table.read_text(encoding="utf-8"))
    assert kept == (*(name for name in SCRIPTS if name not in ("Han", "Thai")), "Han", "Thai")
    assert kept[script_of[ord("日")]] == "Han"
    assert "Unicode" in capsys.readouterr().out


def test_no_table_without_the_library(tmp_path, monkeypatch, capsys):
    table = tmp_path / "script_table.txt"
    table.write_text(TABLE_TEXT, encoding="utf-8")
    monkeypatch.setattr(script_table, "TABLE_FILE", table)
    monkeypatch.setitem(sys.modules, "fontTools.unicodedata", None)
    assert script_table.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert table.read_text(encoding="utf-8") == TABLE_TEXT
    monkeypatch.setattr(script_table, "TABLE_FILE", tmp_path / "missing" / "table.txt")
    assert script_table.main() == 2
