"""Rows against a plain loop over one long list of tokens."""

from collections import Counter

import hypothesis.strategies as st
import numpy as np
from hypothesis import example, given

from hnet.config import BOS_ID, EOS_ID
from hnet.data.packing import Stream
from tests.data_helpers import make_documents

SEQ_LENS = st.sampled_from([2, 3, 5, 7, 13, 31])
TEXTS = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=9)


def tokens_of(texts, bos_eos):
    """(id, document, whether a raw byte, whether its predecessor belongs to the document)."""
    tokens = []
    for d, text in enumerate(texts):
        if bos_eos:
            tokens.append((BOS_ID, d, False, False))
        for i, byte in enumerate(text):
            tokens.append((byte, d, True, bos_eos or i > 0))
        if bos_eos:
            tokens.append((EOS_ID, d, False, True))
    return tokens


@given(TEXTS, SEQ_LENS, st.booleans())
@example([b"\xff\xfe", b"\xff", b"\xff\xff"], 5, False)
def test_rows_equal_a_loop(texts, L, bos_eos):
    stream = Stream(make_documents(texts), seq_len=L, bos_eos=bos_eos)
    tokens = tokens_of(texts, bos_eos)
    assert stream.num_tokens == len(tokens)
    starts = [s for s in range(0, len(tokens), L - 1) if s + 1 < len(tokens)]
    assert stream.num_rows == len(starts)
    for r, start in enumerate(starts):
        row = stream.row(r)
        segment = 0
        for t in range(L):
            got = [int(column[t]) for column in row]
            if start + t >= len(tokens):
                assert got == [0, 0, 0, -1]
                continue
            token, d, raw, has_predecessor = tokens[start + t]
            segment += t == 0 or tokens[start + t - 1][1] != d
            assert got == [token, segment, t > 0 and raw and has_predecessor, d]
        assert stream.scored_bytes(r) == row.loss_mask.sum()
        assert [c.dtype for c in row] == [np.int32, np.int32, bool, np.int32]


@given(TEXTS, SEQ_LENS, st.booleans())
def test_every_byte_is_scored_once(texts, L, bos_eos):
    stream = Stream(make_documents(texts), seq_len=L, bos_eos=bos_eos)
    scored, seen_d = Counter(), Counter()
    for r in range(stream.num_rows):
        row = stream.row(r)
        for t in np.flatnonzero(row.loss_mask):
            scored[r * (L - 1) + int(t)] += 1
            seen_d[int(row.document_ids[t])] += 1
    unscored = 0 if bos_eos else 1
    assert all(n == 1 for n in scored.values())
    assert seen_d == Counter({d: len(t) - unscored for d, t in enumerate(texts)}) - Counter()
    assert stream.scored_bytes(np.arange(stream.num_rows)).sum() == scored.total()


@given(TEXTS, SEQ_LENS, st.booleans())
@example([b"\xff\xff", b"\xff\xff\xff"], 7, False)
@example([b"\xff\xff", b"\xff\xff\xff"], 7, True)
def test_eos_targets_are_recognisable(texts, L, bos_eos):
    stream = Stream(make_documents(texts), seq_len=L, bos_eos=bos_eos)
    found = 0
    for r in range(stream.num_rows):
        row = stream.row(r)
        same_segment = row.segment_ids[1:] == row.segment_ids[:-1]
        found += int(((row.input_ids[1:] == EOS_ID) & ~row.loss_mask[1:] & same_segment).sum())
    assert found == (len(texts) if bos_eos else 0)


def test_a_row_shares_one_token_with_the_next():
    text = bytes(range(97, 97 + 23))
    stream = Stream(make_documents([text]), seq_len=7, bos_eos=True)
    rows = [stream.row(r) for r in range(stream.num_rows)]
    assert [bytes(row.input_ids.astype(np.uint8)) for row in rows] == [
        b"\xfeabcdef",
        b"fghijkl",
        b"lmnopqr",
        b"rstuvw\xff",
    ]
    assert [row.loss_mask.tolist() for row in rows[::3]] == [
        [False] + [True] * 6,
        [False] + [True] * 5 + [False],
    ]


def test_too_short_to_predict_anything():
    assert Stream(make_documents([b"x"]), seq_len=5, bos_eos=False).num_rows == 0
    assert Stream(make_documents([]), seq_len=5, bos_eos=True).num_rows == 0
    one = Stream(make_documents([b"x"]), seq_len=5, bos_eos=True).row(0)
    assert one.loss_mask.tolist() == [False, True, False, False, False]
