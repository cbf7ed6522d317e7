"""A default route without a script of the text: fitted on synthetic scripts, one run or many."""

from dataclasses import replace
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hnet.chunking import routes
from hnet.chunking.rate_control import map_offsets
from hnet.config import ChunkingConfig
from hnet.data import open_corpus, train_batches
from hnet.data.row_routes import in_unknown_scripts
from hnet.errors import ConfigError
from hnet.train import exact_offsets as settling
from hnet.train.compiled_run import put_whole_batch
from hnet.train.config import MeshConfig, RateControlConfig, TrainConfig
from hnet.train.default_route import fit_default_route
from hnet.train.exact_offsets import set_exact_offsets
from hnet.train.parallel_program import build as build_runs
from tests.networks import QUICK
from tests.training import TINY, build, tiny_run

GROUPS = (("Latin",), ("Greek", "Devanagari"))
STEPS = 24


def routed(workdir, ratio=3.0):
    cut = ChunkingConfig(ratio, routes=3, hold_rate=True)
    files = ("synthetic:latin:9000", "synthetic:greek:9000", "synthetic:devanagari:9000")
    base, (outer, inner) = tiny_run(workdir), TINY.stages
    return replace(
        base,
        model=replace(
            TINY,
            stages=(replace(outer, arch_layout=("t1", "t1"), chunking=cut), inner),
            route_groups=GROUPS,
        ),  # fmt: skip
        data=replace(base.data, files=files, batch_size=4, seq_len=64),
        rate_control=RateControlConfig(fit_default=True),
        train=TrainConfig(steps=STEPS),
        mesh=MeshConfig(data=1),
    )


def made_up(corpus, config, count, seed=5):
    with train_batches(corpus, config.data, seed=seed, route_groups=GROUPS) as batches:
        return list(in_unknown_scripts(islice(batches, count), seed))


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    config = routed(tmp_path_factory.mktemp("one_run"))
    program = build(config, devices=jax.devices()[:1])
    return config, program, open_corpus(config.data), program.init().params


def logits(program, params, batches):
    """Logits of each row, without the offset."""
    fed = [put_whole_batch(batch, program.mesh) for batch in batches]
    found = [
        program.evaluate(params, batch, capacities=(None,))["logits_without_offset"]
        for batch in fed
    ]
    return np.concatenate([np.asarray(stages[0][0]) for stages in found])


def test_rows_come_to_the_target_each_and_nothing_else_changes(one_run):
    """For any previous offset, since no text was on this route."""
    config, program, corpus, start = one_run
    start = map_offsets(lambda stage, offset_R: offset_R - 8.0, start)
    batches = made_up(corpus, config, 3)
    fitted = fit_default_route(program, start, 0, [3.0], batches * 15, 45)

    def spread(params):  # over rows, with all rows together at the target
        logit_BL = logits(program, params, batches)
        return np.log((logit_BL > np.quantile(logit_BL, 2 / 3)).mean(axis=1)).std()

    assert spread(fitted) < 0.5 * spread(start)
    own, *others = fitted["backbone"]["boundary_offset"].tolist()
    assert others == [-8, -8]
    assert (logits(program, fitted, batches) + own > 0).mean() == pytest.approx(1 / 3, rel=0.1)
    for (path, new), old in zip(
        jax.tree_util.tree_leaves_with_path(fitted), jax.tree.leaves(start)
    ):
        if "boundary_offset" in jax.tree_util.keystr(path):
            continue
        is_router = "routing_module" in jax.tree_util.keystr(path)
        assert (new[0] != old[0]).any() == is_router
        np.testing.assert_array_equal(new[is_router:], old[is_router:])


def test_each_device_packs_its_own_rows_by_route(one_run, monkeypatch):
    config, program, corpus, start = one_run
    packed, pack = [], routes.pack_by_route
    monkeypatch.setattr(
        routes,
        "pack_by_route",
        lambda ids_N, *rest: packed.append(ids_N.size) or pack(ids_N, *rest),
    )
    batches = made_up(corpus, config, 2)
    together = build(replace(config, mesh=MeshConfig(data=2)), devices=jax.devices()[:2])
    params = jax.device_put(start, together.shardings.params)
    fitted, own = (
        jax.device_get(fit_default_route(p, state, 0, [3.0], batches, 2))
        for p, state in ((together, params), (program, start))
    )
    batch_size, seq_len = config.data.batch_size, config.data.seq_len
    assert set(packed) == {batch_size * seq_len // 2, batch_size * seq_len}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), fitted, own)


def test_the_last_update_is_followed_by_a_fit_and_its_offset(one_run, monkeypatch):
    """The offset is exact for the fitted router, on text that was not used to set it."""
    monkeypatch.setattr(settling, "UNKNOWN_FRAC", 0.5)
    config, program, corpus, start = one_run
    beats = []
    fitted = set_exact_offsets(
        program, start, corpus, [config], (None,), beat=lambda: beats.append(1)
    )
    assert len(beats) == 2 * STEPS  # a fit and a pass over as many batches as were trained on
    assert all(
        (new[0] != old[0]).any()
        for new, old in zip(
            *(jax.tree.leaves(p["backbone"]["routing_module"]) for p in (fitted, start))
        )
    )
    logit_BL = logits(program, fitted, made_up(corpus, config, 12, seed=77))
    cut_BL = logit_BL + fitted["backbone"]["boundary_offset"][0] > 0
    assert 1 / cut_BL.mean() == pytest.approx(3, rel=0.2)


def test_runs_fitted_together_are_those_fitted_separately(one_run):
    config, program, corpus, start = one_run
    configs = [config, replace(routed(config.workdir, 4.0), seed=1)]
    devices = jax.devices()[:1]
    together = build_runs(configs, devices=devices, compiler_options=QUICK)
    params = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), start)
    batches = made_up(corpus, config, 3)

    def fit(program, params, targets):
        return jax.device_get(fit_default_route(program, params, 0, targets, batches, 3))

    found = fit(together, params, [3.0, 4.0])
    own = fit(program, jax.tree.map(lambda x: x[1], params), [4.0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, atol=1e-4), found, own)


def test_a_default_route_that_nothing_fits_is_refused(tmp_path):
    config = routed(tmp_path)
    outer, inner = config.model.stages
    for change in ({"hold_rate": False}, {"routed_parameters": False}):
        stage = replace(outer, chunking=replace(outer.chunking, **change))
        with pytest.raises(ConfigError, match="rate_control.fit_default=True"):
            replace(config, model=replace(config.model, stages=(stage, inner)))
