"""Route ids of packed rows against whole documents decoded by Python."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hnet.data import DataConfig, eval_batches, open_corpus, open_part, row_routes, train_batches
from hnet.data.packing import Stream
from hnet.data.row_routes import RowRoutes, ScriptStates, in_unknown_scripts, unknown_script
from hnet.data.scripts import SCRIPTS, script_ids
from hnet.errors import ConfigError
from tests.data.test_scripts import slow_ids, texts
from tests.data_helpers import jsonl, make_documents

GROUPS = (("Cyrillic", "Greek"), ("Han", "Hiragana", "Katakana"), ("Common",))
LATIN, CYRILLIC, HAN, COMMON = 0, 1, 2, 3
documents = st.lists(texts.filter(len), min_size=1, max_size=6)


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    monkeypatch.setattr(row_routes, "_WINDOW", 4)
    monkeypatch.setattr(row_routes, "_STRIDE", 5)


def routes_of_tokens(data: bytes, bos_eos: bool) -> list[int]:
    """Route of each token of a document, by the definition."""
    group = {name: i + 1 for i, names in enumerate(GROUPS) for name in names}
    routes = [group.get(SCRIPTS[i], 0) for i in slow_ids(data)]
    return [COMMON, *routes, routes[-1]] if bos_eos else routes


@given(documents, st.sampled_from([2, 3, 7, 31]), st.booleans(), st.randoms())
@example(["я12345678901234567890".encode()], 3, True, None)
@example(["日".encode() + b"\xf0\x9f\x98\x80" * 9, b"1", b"a"], 2, False, None)
@settings(max_examples=60)
def test_rows_have_the_routes_of_whole_documents(texts, L, bos_eos, random):
    stream = Stream(make_documents(texts), seq_len=L, bos_eos=bos_eos)
    tokens = [route for text in texts for route in routes_of_tokens(text, bos_eos)]
    routes = RowRoutes([stream], GROUPS)
    order = list(range(stream.num_rows + 1))  # the last one is empty
    if random:
        random.shuffle(order)
    for r in order:
        (got,) = routes([(0, r)], [stream.row(r)])
        own = tokens[r * (L - 1) : r * (L - 1) + L] if r < stream.num_rows else []
        assert got.tolist() == own + [COMMON] * (L - len(own))
        assert got.dtype == np.int32


@given(texts.filter(len), st.randoms())
@settings(max_examples=50)
def test_states_are_those_of_the_text_before(text, random):
    states = ScriptStates(make_documents([b"x", text]))
    stops = list(range(len(text) + 1))
    random.shuffle(stops)
    for stop in stops:
        assert states.before(1, stop) == script_ids(text[:stop])[1]


def test_text_without_a_script_is_read_once(monkeypatch):
    digits, read = b"a" + b"0123456789" * 50, []

    def counted(text):
        read.append(len(text))
        return script_ids(text)

    monkeypatch.setattr(row_routes, "script_ids", counted)
    states = ScriptStates(make_documents([digits]))
    for stop in range(len(digits), 0, -7):
        assert states.before(0, stop) >> 24 == SCRIPTS.index("Latin")
    assert sum(read) < 5 * len(digits)


@pytest.fixture
def files(tmp_path):
    words = ["да 12", "日本 34 ok", "5678 9", "plain words", "ω🙂 1 \u202e"]
    (tmp_path / "a.jsonl").write_bytes(jsonl([" ".join(words[i:]) for i in range(5)]))
    (tmp_path / "b.txt").write_bytes("Ж 1234567890 1234567890".encode() * 3)
    return (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.txt")


def test_batches_bring_route_ids_to_whoever_asks(files):
    config = DataConfig(files=files, eval_fraction=0, batch_size=2, seq_len=11, weights=(2.0, 1.0))
    corpus = open_corpus(config)
    part = corpus.train
    in_order = list(eval_batches(part, config, route_groups=GROUPS))
    ids, routes = (np.concatenate([b[k] for b in in_order]) for k in ("input_ids", "route_ids"))
    expected = []
    for entry in part.documents:
        streams = Stream(entry, seq_len=11, bos_eos=True)
        whole = [entry.read(d, 0, int(n)).tobytes() for d, n in enumerate(entry.length_D)]
        tokens = [r for text in whole for r in routes_of_tokens(text, True)]
        for r in range(streams.num_rows):
            expected.append((tokens[10 * r : 10 * r + 11] + [COMMON] * 10)[:11])
    assert routes[: len(expected)].tolist() == expected
    assert set(routes[len(expected) :].flat) <= {COMMON}
    known = {(i.tobytes(), r.tobytes()) for i, r in zip(ids, routes)}
    with train_batches(corpus, config, seed=0, route_groups=GROUPS) as batches:
        for batch in islice(batches, 9):
            for i, r in zip(batch["input_ids"], batch["route_ids"]):
                assert (i.tobytes(), r.tobytes()) in known
    with train_batches(corpus, config, seed=0) as batches:
        assert "route_ids" not in next(batches)


def test_a_share_of_the_rows_is_put_into_unknown_scripts(files):
    """Bytes keep their kind; each row has its own synthetic script and is on the default route."""
    config = DataConfig(files=files, eval_fraction=0, batch_size=4, seq_len=11)
    corpus, fields = open_corpus(config), ("input_ids", "segment_ids", "loss_mask", "route_ids")

    def rows(batches):
        taken = list(batches)
        return [np.concatenate([batch[k] for batch in taken]) for k in fields]

    with train_batches(corpus, config, seed=5, route_groups=GROUPS) as opened:
        batches = list(islice(opened, 50))
    was, got = rows(batches), rows(in_unknown_scripts(batches, seed=5, frac=0.3))
    np.testing.assert_array_equal(was[0], rows(batches)[0])
    changed = (was[0] != got[0]).any(axis=1)
    beyond_ascii = (was[0] >= 0x80) & (was[0] < 0xF5)
    possible = beyond_ascii.any(axis=1)
    assert abs(changed[possible].mean() - 0.3) < 0.1  # about 100 rows
    assert (changed.reshape(-1, 4).sum(axis=0) > 3).all()
    assert not got[3][changed].any() and was[3][changed].any()
    np.testing.assert_array_equal(got[3][possible & ~changed], was[3][possible & ~changed])
    np.testing.assert_array_equal(got[0][~beyond_ascii], was[0][~beyond_ascii])
    for first, stop in [(0x80, 0xC0), (0xC2, 0xE0), (0xE0, 0xF0), (0xF0, 0xF5)]:
        of_kind = [(x[0] >= first) & (x[0] < stop) for x in (was, got)]
        assert of_kind[0].any()
        np.testing.assert_array_equal(*of_kind)
    for a, b in zip(was[0][changed], got[0][changed]):  # byte for byte, and back
        assert len({*zip(a.tolist(), b.tolist())}) == len({*a.tolist()}) == len({*b.tolist()})
    assert len({unknown_script(5, slot, 1.0).tobytes() for slot in range(9)}) == 9
    for k in (1, 2):
        np.testing.assert_array_equal(got[k], was[k])


def test_a_group_without_a_script_is_refused(files):
    config = DataConfig(files=files, seq_len=11)
    with pytest.raises(ConfigError, match=r"model.route_groups.0 has 'Cyrilic'.*'Cyrillic'"):
        eval_batches(open_part(files), config, route_groups=(("Cyrilic",),))
