"""Chunks that consist of whole characters."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.chunking import characters
from hnet.chunking.config import ChunkingConfig
from hnet.decode import stream
from hnet.errors import ConfigError
from tests.networks import network, quick_jit, random_params, stage

TEXT = "aé€😀ßzя".encode()
DOCUMENTS = (TEXT, TEXT[1:], b"\x80\x80a\xc3", b"\xe2\x82", b"\xc3\xc3\xa9\xa9\xff\xfe\xf5\x90")


END = dict(predictor="mlp", alignment="end", pool="mean", dechunk="repeat", residual="add")


def lacks(document: bytes) -> list[int]:
    """Continuation bytes that the last character lacks after each byte, by a plain loop."""
    found, missing = [], 0
    for byte in document:
        if 0x80 <= byte <= 0xBF:
            missing = max(missing - 1, 0)
        elif 0xC2 <= byte <= 0xDF:
            missing = 1
        elif 0xE0 <= byte <= 0xEF:
            missing = 2
        else:
            missing = 3 if 0xF0 <= byte <= 0xF4 else 0
        found.append(missing)
    return found


def rows():
    ids_L = np.frombuffer(b"".join(DOCUMENTS) + b"\0\0", np.uint8).astype(np.int32)
    segments = [np.full(len(d), i + 1) for i, d in enumerate(DOCUMENTS)]
    return ids_L[None], np.concatenate([*segments, [0, 0]]).astype(np.int32)[None]


def test_missing_bytes_are_those_of_a_loop_per_document():
    ids_BL, segment_ids_BL = rows()
    found = np.asarray(characters.missing(jnp.asarray(ids_BL), jnp.asarray(segment_ids_BL)))
    expected = [n for document in DOCUMENTS for n in lacks(document)]
    assert found[0, :-2].tolist() == expected
    missing, by_step = jnp.int32(0), []
    for byte in TEXT:
        missing = characters.missing_after(missing, jnp.int32(byte))
        by_step.append(int(missing))
    assert by_step == lacks(TEXT)
    ends = np.cumsum([len(c.encode()) for c in TEXT.decode()]) - 1
    assert [i for i, n in enumerate(by_step) if n == 0] == ends.tolist()


@pytest.mark.parametrize("alignment", ["start", "end"])
def test_no_chunk_divides_a_character(alignment):
    """Random weights have boundaries inside characters; with the setting, the same ones outside."""
    plain = network(stage("t1 t1", 26, **(END if alignment == "end" else {})), stage("t1", 26))
    first = plain.stages[0]
    chunking = replace(first.chunking, at_characters=True)
    config = replace(plain, stages=(replace(first, chunking=chunking), *plain.stages[1:]))
    graph, params = random_params(plain)
    graphs = {False: graph, True: random_params(config)[0]}
    ids_BL, segment_ids_BL = rows()
    ids_BL = np.concatenate([ids_BL] * 2)
    ids_BL[1, : len(TEXT)] = np.frombuffer(TEXT, np.uint8)
    segment_ids_BL = np.concatenate([segment_ids_BL] * 2)

    masks = {}
    for at_characters, graph in graphs.items():
        call = quick_jit(lambda p, *a, graph=graph: nnx.merge(graph, p)(*a)[1][0])
        found = call(params, jnp.asarray(ids_BL), jnp.asarray(segment_ids_BL))
        masks[at_characters] = np.asarray(found.boundary_mask_BL)
    fed = jnp.asarray(ids_BL), jnp.asarray(segment_ids_BL)
    allowed = np.asarray(characters.missing(*fed)) == 0
    if alignment == "start":
        begins = np.diff(segment_ids_BL, prepend=0) != 0
        allowed = begins | ((ids_BL & 0xC0) != 0x80)
    assert (masks[False] & ~allowed).any()
    np.testing.assert_array_equal(masks[True], masks[False] & allowed)


@pytest.mark.parametrize("alignment", ["start", "end"])
def test_a_prompt_may_end_inside_a_character(alignment):
    """After every beginning of a text, the next step has a boundary where the whole row has one."""
    outer = stage("t1 t1", 26, at_characters=True, **(END if alignment == "end" else {}))
    config = network(outer, stage("t1", 26))
    graph, params = random_params(config)
    lengths_B = np.arange(len(TEXT), dtype=np.int32)
    ids_BL = np.tile(np.frombuffer(TEXT, np.uint8).astype(np.int32), (len(TEXT), 1))

    @quick_jit
    def masks(params, ids_BL, next_B):
        model = nnx.merge(graph, params)
        _, _, cache = stream.prefill(model, ids_BL, lengths_B, stream.full_lens(config, len(TEXT)))
        _, found, _ = stream.step(model, cache, next_B, jnp.ones(len(TEXT), bool))
        return model(ids_BL)[1][0].boundary_mask_BL[0], found.mask_BS[:, 0]

    whole_L, by_step_L = masks(params, jnp.asarray(ids_BL), jnp.asarray(ids_BL[0]))
    np.testing.assert_array_equal(by_step_L, whole_L)
    assert whole_L.any() and not whole_L.all()


def test_what_it_does_not_go_with():
    with pytest.raises(ConfigError, match="at_characters=True with vocab_size=300: .*use a voc"):
        replace(network(stage("t1 t1", 26, at_characters=True), stage("t1", 26)), vocab_size=300)
    problem = ChunkingConfig(at_characters=True).problem(stage_idx=1, route_groups=0)
    assert problem.startswith("at_characters=True in stage 1") and "set it in stage 0" in problem
