"""The template, copied elsewhere, works wherever a named configuration does."""

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hnet.decode import stream
from hnet.decode.generate import generate
from hnet.decode.sampling import Sampling
from hnet.dotted import with_fields
from hnet.errors import ConfigError
from hnet.flops import forward_flops, param_counts, training_flops
from hnet.inspect.index import FOLDER, SegmentationIndex
from hnet.model import HNetLM, split
from hnet.train import parallel_program
from hnet.train.compiled_run import put_batch, untraced
from hnet.train.config import MeshConfig
from tests.networks import QUICK, quick_jit, random_params
from tests.training import build, run, tiny_run

TEMPLATE = Path(__file__).parents[2] / "experiments" / "template"
PREDICTOR = "model.stages.0.chunking.predictor"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The template under another name, in a folder that Python imports from."""
    parent = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(TEMPLATE, parent / "my_paper")
    sys.path.insert(0, str(parent))
    yield parent
    sys.path.remove(str(parent))


def with_hazard(config, **fields):
    part = {"name": "my_paper.hazard:Hazard", **fields}
    return with_fields(config, {PREDICTOR: part})


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    config = with_hazard(tiny_run(tmp_path_factory.mktemp("runs") / "run"))
    return config, run(config)


def test_it_is_one_short_file(folder):
    assert len((folder / "my_paper" / "hazard.py").read_text().splitlines()) <= 60
    hazard = importlib.import_module("my_paper.hazard").Hazard
    assert with_hazard(tiny_run(folder)).model.stages[0].chunking.predictor.part is hazard


def test_it_trains_and_shows_in_the_boundaries_tab(trained):
    config, outcome = trained
    assert outcome.evaluation is not None and np.isfinite(outcome.evaluation.bpb)
    weight = outcome.state.params["backbone"]["routing_module"]["weight"]
    start = outcome.program.init().params["backbone"]["routing_module"]["weight"]
    assert np.abs(np.asarray(weight - start)).max() > 1e-4, "the ratio loss moves it"
    index = SegmentationIndex(Path(config.workdir) / "tensorboard" / FOLDER)
    index.refresh()
    assert 8 in index.steps and 0 < outcome.evaluation.bytes_per_chunk(0) < 32


@pytest.mark.every  # `generate` calls what the next test calls, and knows no parts
def test_it_samples(trained):
    _, outcome = trained
    model = nnx.merge(outcome.program.graph, outcome.state.params)
    (result,) = generate(model, ["ab"], Sampling(max_bytes=5, temperature=0))
    assert len(result.data) == 5


def test_it_streams_as_it_computes(folder):
    config = with_hazard(tiny_run(folder)).model
    graph, params = random_params(config)
    ids_BL = np.random.default_rng(0).integers(0, 256, (3, 17)).astype(np.int32)
    lengths_B = np.full(3, 5, np.int32)

    @quick_jit
    def both(params):
        model = nnx.merge(graph, params)
        logits_BLV, (boundaries,) = model(ids_BL)
        room = stream.full_lens(config, 17)
        logits_BV, _, cache = stream.prefill(model, ids_BL[:, :5], lengths_B, room)

        def one(cache, byte_B):
            logits_BV, found, cache = stream.step(model, cache, byte_B)
            return cache, (logits_BV, found.mask_BS[:, 0])

        _, (logits_LBV, mask_LB) = jax.lax.scan(one, cache, jnp.asarray(ids_BL[:, 5:].T))
        return logits_BLV, boundaries.boundary_mask_BL, logits_BV, logits_LBV, mask_LB

    logits, mask, prompt, steps, step_mask = jax.device_get(both(params))
    assert 0 < mask[:, 1:].mean() < 1
    np.testing.assert_allclose(prompt, logits[:, 4], atol=1e-5)
    np.testing.assert_allclose(steps.swapaxes(0, 1), logits[:, 5:], atol=1e-5)
    assert np.array_equal(step_mask.T, mask[:, 5:])


def test_a_sweep_over_its_traced_number_is_one_program(folder):
    configs = [with_hazard(tiny_run(folder), growth=growth) for growth in (0.0, 2.0)]
    assert untraced(configs[0]) == untraced(configs[1])
    program = parallel_program.build(configs, devices=jax.devices()[:2], compiler_options=QUICK)
    assert program.hparams[1][0]["predictor"]["growth"].tolist() == [0.0, 2.0]


@pytest.mark.every
def test_it_lies_on_a_mesh_of_two_by_two_and_gives_what_one_device_gives(trained):
    config, outcome = trained
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 254, (8, 32)).astype(np.int32)
    batch = {"input_ids": ids, "segment_ids": np.ones_like(ids), "loss_mask": ids >= 0}
    found = []
    meshed = build(replace(config, mesh=MeshConfig(data=2, fsdp=2)), devices=jax.devices()[:4])
    for program in (meshed, outcome.program):
        state, metrics = program.step(
            program.init(), put_batch(batch, program.mesh), program.hparams,
            capacities=outcome.program.ladder.capacities,
        )  # fmt: skip
        found.append((jax.device_get(metrics["loss/ce"]), state.params["backbone"]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    weight = found[0][1]["routing_module"]["weight"]
    assert not weight.sharding.is_fully_replicated or weight.shape[0] % 2


def test_it_counts_itself(folder):
    model = with_hazard(tiny_run(folder)).model
    assert param_counts(model)["stage0/routing_module"] == 16 + 1
    for flops in (forward_flops, training_flops):
        counted = flops(model, (32, 11))["stage0/routing_module"].total
        assert 32 * 2 * 16 <= counted <= 32 * 16 * (100 if flops is training_flops else 8)


def test_a_bad_setting_is_refused_in_one_line(folder):
    with pytest.raises(ConfigError, match="predictor.growth=-1.0: use 0 or more"):
        with_hazard(tiny_run(folder), growth=-1.0)
    with pytest.raises(ConfigError, match="unknown field.*growht.*growth"):
        with_hazard(tiny_run(folder), growht=1.0)


def test_the_seam_finds_its_parameters(folder):
    config = with_hazard(tiny_run(folder)).model
    _, params = split(HNetLM(config, rngs=nnx.Rngs(0)))
    assert jax.tree.map(jnp.shape, params["backbone"]["routing_module"]) == {
        "weight": (16,),
        "bias": (1,),
    }
