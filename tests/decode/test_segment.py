"""Segmentations of routed models and of every mix of alignments, against a plain loop."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from hnet.config import BOS_ID
from hnet.decode.segment import POSITIONS, as_starts, segment_all, segmenter
from hnet.errors import ConfigError
from hnet.inspect.segmentation import Segmentation
from tests.networks import MLP_END, network, quick_jit, random_params, stage

LATIN = "abc déf 12, "
MIXED = LATIN + "Жук 🙂 日本ok\u202e"


def spans_of_chunks(spans, cuts, alignment):
    """(chunks as byte spans, those that the stage inside sees) of positions as byte spans."""
    groups, current = [], []
    for span, cut in zip(spans, cuts):
        if alignment == "start" and cut and current:
            groups.append(current)
            current = []
        current.append(span)
        if alignment == "end" and cut:
            groups.append(current)
            current = []
    whole = lambda group: (group[0][0], group[-1][1])
    closed = [whole(g) for g in groups]
    unfinished = [whole(current)] if current else []
    if alignment == "end":
        return closed + unfinished, [(0, 0), *closed]
    return closed + unfinished, closed + unfinished


@given(st.data(), st.lists(st.sampled_from(["start", "end"]), min_size=1, max_size=3))
@settings(max_examples=60)
def test_starts_are_those_of_a_loop(data, alignments):
    n = data.draw(st.integers(1, 9))
    positions = [(0, 0), *((t, t + 1) for t in range(n))]  # BOS first
    stages, outputs, expected = [], [], []
    for alignment in alignments:
        cuts = data.draw(st.lists(st.booleans(), min_size=len(positions), max_size=len(positions)))
        cuts[0] |= alignment == "start"
        stages.append(stage("t1 t1", 26, **(MLP_END if alignment == "end" else {})))
        spare = [False] * data.draw(st.integers(0, 2))
        outputs.append((np.array(cuts + spare), np.array(cuts + spare, np.float32)))
        chunks, positions = spans_of_chunks(positions, cuts, alignment)
        expected.append(tuple(sorted({start for start, _ in chunks if start < n} | {0})))
    model = network(*stages, stage("t1", 26))
    starts, in_front = as_starts(model, outputs)
    found = Segmentation.from_router(b"x" * n, starts, prefix=in_front + 1)
    assert [s.starts for s in found.stages] == expected
    for s in range(len(stages)):  # p is shown at the start it belongs to
        at = dict(zip(found.positions(s), found.stages[s].probs))
        assert all(p == 1 for start, p in at.items() if start in expected[s][1:])
        assert all(p == 0 for start, p in at.items() if start not in expected[s])


@pytest.fixture(scope="module")
def routed():
    model = network(
        stage("t1 t1", 26, routes=2), stage("t1", 26), route_groups=(("Han", "Cyrillic"),)
    )
    graph, params = random_params(model)
    # the default route has no boundaries of its own
    router = params["backbone"]["routing_module"]
    for name in ("q_proj_layer", "k_proj_layer"):
        router[name]["kernel"] = router[name]["kernel"].at[0].set(np.eye(26) * 1e-20)
    return model, graph, params


def test_each_byte_is_cut_by_the_router_of_its_script(routed, monkeypatch):
    monkeypatch.setattr(jax, "jit", quick_jit)
    model, graph, params = routed
    found = segmenter(graph, model, bos=True)(params, [MIXED.encode(), LATIN.encode()], ["a", "b"])
    text = MIXED.encode()
    zhe, latin_again = text.index("Ж".encode()) + 1, text.index(b"ok")
    assert found[0].routes == ((0, "default"), (zhe, "Han+Cyrillic"), (latin_again, "default"))
    starts = found[0].stages[0].starts
    assert any(zhe <= s < latin_again for s in starts[1:])
    assert not any(s < zhe or s >= latin_again for s in starts[1:])
    assert found[1].routes == ((0, "default"),) and found[1].stages[0].starts == (0,)


def test_a_model_without_routes_names_scripts_and_segments_in_batches_as_one_by_one(monkeypatch):
    monkeypatch.setattr(jax, "jit", quick_jit)
    model = network(stage("t1 t1", 26), stage("t1", 26))
    graph, params = random_params(model)
    segment = segmenter(graph, model, bos=True)
    texts = [MIXED.encode(), b"", *(LATIN.encode() * 2)[::3].split(b" "), LATIN.encode()] * 7
    found = segment_all(segment, params, texts)
    assert [seg.data for seg in found] == texts
    assert {name for _, name in found[0].routes} == {"Latin", "Cyrillic", "Han"}
    longest = max(map(len, texts))
    nll = quick_jit(lambda ids: -jax.nn.log_softmax(nnx.merge(graph, params)(ids)[0]))
    for i in (0, 3, len(texts) - 1):
        (separate,) = segment(params, [texts[i]])
        assert [s.starts for s in separate.stages] == [s.starts for s in found[i].stages]
        np.testing.assert_allclose(separate.bits, found[i].bits, atol=2e-3)
        ids = np.array([[BOS_ID, *texts[i]]], np.int32)
        padded = np.pad(ids, ((0, 0), (0, longest + 1 - ids.shape[1])))
        exact = np.asarray(nll(padded))[0][np.arange(len(texts[i])), ids[0, 1:]]
        np.testing.assert_allclose(separate.bits, exact / np.log(2), atol=2e-3)


def test_long_texts_run_in_smaller_batches():
    """Rows times length is bounded, and results are in the order of the texts."""
    asked = []

    def segment(_, texts):
        asked.append((len(texts), max(map(len, texts))))
        return [Segmentation(text, stages=()) for text in texts]

    texts = [b"x" * n for n in (5000, 10, 100_000, 0, *range(900, 1000), 3000)]
    found = segment_all(segment, None, texts)
    assert [seg.data for seg in found] == texts
    assert all(rows == 1 or rows * 2 * longest <= 2 * POSITIONS for rows, longest in asked)
    assert max(rows for rows, _ in asked) == 32 and asked[-1] == (1, 100_000)


def test_routes_of_unknown_scripts_are_refused(routed):
    model, graph, _ = routed
    with pytest.raises(ConfigError, match="model.route_groups.0"):
        segmenter(graph, replace(model, route_groups=(("Klingon",),)), bos=True)
