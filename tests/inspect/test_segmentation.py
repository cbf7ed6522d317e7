import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from hnet.errors import ConfigError
from hnet.inspect.segmentation import (
    Segmentation,
    StageBoundaries,
    characters,
    read_segmentations,
)


@st.composite
def routed(draw, alignment="start", prefix=0):
    """A text and the outputs of up to three routers, followed by padding."""
    data = draw(
        st.binary(min_size=1, max_size=23) | st.text(min_size=1, max_size=11).map(str.encode)
    )
    count, outputs = len(data) + prefix, []
    for _ in range(draw(st.integers(1, 3))):
        mask = np.array(draw(st.lists(st.booleans(), min_size=count + 2, max_size=count + 2)))
        prob = np.array(draw(st.lists(st.floats(0, 1, width=32), min_size=len(mask), max_size=99)))
        if alignment == "start" and count:
            mask[0] = True
        outputs.append((mask, prob[: len(mask)]))
        ends = int(mask[: max(count - 1, 0)].sum())
        count = int(mask[:count].sum()) if alignment == "start" else ends + bool(count)
    return data, outputs


def start_oracle(data, outputs):
    """Chunk starts by walking through positions one at a time."""
    positions, stages = list(range(len(data))), []
    for mask, _ in outputs:
        positions = [o for i, o in enumerate(positions) if mask[i]]
        stages.append(tuple(positions))
    return stages


def end_oracle(data, outputs):
    """Group bytes into chunks that close at an END boundary, then chunks into larger ones."""
    chunks, stages = [[o] for o in range(len(data))], []
    for mask, _ in outputs:
        groups = [[]]
        for i, chunk in enumerate(chunks):
            groups[-1] += chunk
            if mask[i] and i + 1 < len(chunks):
                groups.append([])
        chunks = [g for g in groups if g]
        stages.append(tuple(g[0] for g in chunks))
    return stages


@given(routed())
def test_start_boundaries_are_where_a_walk_finds_them(case):
    data, outputs = case
    seg = Segmentation.from_router(data, outputs)
    assert [s.starts for s in seg.stages] == start_oracle(data, outputs)
    for i, (_, prob) in enumerate(outputs):
        np.testing.assert_array_equal(
            np.float32(seg.stages[i].probs), np.float32(prob[: len(seg.positions(i))])
        )


@given(routed(alignment="end"))
def test_end_boundaries_start_the_next_chunk(case):
    data, outputs = case
    seg = Segmentation.from_router(data, outputs, alignment="end")
    assert [s.starts for s in seg.stages] == end_oracle(data, outputs)
    for i, (_, prob) in enumerate(outputs):  # p of the end at t is shown where t + 1 starts
        probs = np.float32(seg.stages[i].probs)
        np.testing.assert_array_equal(probs[1:], np.float32(prob[: len(probs) - 1]))
        assert probs[0] == 1


@given(routed(prefix=1))
def test_a_prefix_is_no_part_of_the_text(case):
    data, outputs = case
    seg = Segmentation.from_router(data, outputs, prefix=1)
    whole = start_oracle(b"\xfe" + data, outputs)  # the same with the prefix as a byte
    assert [s.starts for s in seg.stages] == [
        tuple(sorted({max(o - 1, 0) for o in starts})) for starts in whole
    ]
    np.testing.assert_array_equal(
        np.float32(seg.stages[0].probs), np.float32(outputs[0][1][1 : len(data) + 1])
    )


@given(routed(), st.text(max_size=5))
def test_json_keeps_everything(case, name):
    data, outputs = case
    seg = Segmentation.from_router(
        data, outputs, name=name, routes=["a"] + ["b"] * (len(data) - 1), gold={"words": [1, 2, 99]}
    )
    assert Segmentation.from_json(json.loads(json.dumps(seg.to_json()))) == seg


@given(routed())
def test_chunks_join_to_the_text(case):
    seg = Segmentation.from_router(*case)
    for i in range(len(seg.stages)):
        assert b"".join(seg.chunks(i)) == seg.data
        assert seg.chunk_lengths(i).tolist() == [len(c) for c in seg.chunks(i)]


@given(st.binary(max_size=23))
def test_characters_cover_all_bytes(data):
    found = characters(data)
    assert b"".join(data[a:b] for a, b, _ in found) == data
    assert all(data[a:b] == c.encode("utf-8", "surrogateescape") for a, b, c in found)


def test_empty_text():
    seg = Segmentation.from_router(b"", [(np.zeros(0), np.zeros(0))])
    assert seg.stages == (StageBoundaries((), ()),)
    assert Segmentation.from_json(seg.to_json()) == seg


def test_valid_text_is_readable_in_the_json_and_other_bytes_survive():
    assert Segmentation("é".encode()).to_json()["text"] == "é"
    assert "text" not in Segmentation(b"\xff").to_json()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": (StageBoundaries((0, 2), (1, 0)),)}, "2 values for 3 positions"),
        ({"stages": (StageBoundaries((1,), (1, 0, 0)),)}, "increase from 0"),
        ({"stages": (StageBoundaries((0, 5), (1, 0, 0)),)}, "positions of that stage"),
        ({"stages": (StageBoundaries((0,), (1, float("nan"), 0)),)}, "between 0 and 1"),
        ({"gold": {"words": (0, 1)}}, "gold 'words'"),
        ({"routes": ((1, "Latin"),)}, "routes"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(change, says):
    with pytest.raises(ConfigError, match=says) as e:
        Segmentation(b"abc", "t", **change)
    assert "\n" not in str(e.value)


def test_inner_boundaries_must_be_outer_ones():
    outer = StageBoundaries((0, 2), (1, 0, 1))
    with pytest.raises(ConfigError, match=r"stages.1.starts"):
        Segmentation(b"abc", stages=(outer, StageBoundaries((0, 1), (1, 1))))


def test_router_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="2 values for 3 positions"):
        Segmentation.from_router(b"abc", [(np.ones(2), np.ones(2))])
    with pytest.raises(ConfigError, match="alignment='end'"):
        Segmentation.from_router(b"abc", [(np.zeros(3), np.zeros(3))])
    with pytest.raises(ConfigError, match="use 'start' or 'end'"):
        Segmentation.from_router(b"abc", [], alignment="middle")


@pytest.mark.parametrize("content", [{}, {"version": 9}, {"version": 1, "text": 3}, [], 7])
def test_other_json_is_refused_with_one_line(content, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as e:
        read_segmentations(path)
    assert "\n" not in str(e.value)


def test_reading_back_a_file(tmp_path):
    seg = Segmentation.from_router(b"a\xffb", [(np.array([1, 0, 1]), np.array([1, 0.25, 0.75]))])
    path = tmp_path / "s.json"
    path.write_text(2 * (json.dumps(seg.to_json()) + "\n"))
    assert read_segmentations(path) == [seg, seg]
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_segmentations(path)
    with pytest.raises(ConfigError, match="No such file"):
        read_segmentations(tmp_path / "none.json")


def test_surprisal_is_kept_in_bits_if_all_of_it_is_finite():
    outputs = [(np.array([1, 0]), np.array([1, 0.5]))]
    nats = np.array([np.log(2), -0.0])
    seg = Segmentation.from_router(b"ab", outputs, nats=nats)
    assert seg.bits == (1.0, 0.0) and str(seg.bits[1]) == "0.0"
    assert Segmentation.from_json(json.loads(json.dumps(seg.to_json()))) == seg
    assert "bits" not in Segmentation.from_router(b"ab", outputs).to_json()
    for bad in (np.nan, np.inf):
        assert Segmentation.from_router(b"ab", outputs, nats=np.array([1, bad])).bits == ()


@pytest.mark.parametrize("bits", [(1.0,), (1.0, -0.5), (1.0, float("nan")), (1.0, float("inf"))])
def test_surprisal_that_cannot_be_is_refused(bits):
    with pytest.raises(ConfigError, match="bits of 'x' must be 2 numbers"):
        Segmentation(b"ab", "x", bits=bits)
    content = {"version": 1, "name": "x", "text": "ab", "routes": [], "gold": {}, "stages": []}
    with pytest.raises(ConfigError, match="bits"):
        Segmentation.from_json(content | {"bits": list(bits)})
