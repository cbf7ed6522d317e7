"""AdamW, Muon, averages, schedules and which parameter gets which learning rate."""

import types
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hnet.checkpoint.leaves import flatten
from hnet.config import PUBLISHED, SSMConfig
from hnet.data import eval_batches
from hnet.errors import ConfigError
from hnet.interop import load
from hnet.interop.convert import convert
from hnet.model import abstract, split
from hnet.nn.parameters import ParameterInfo, describe
from hnet.train.compiled_run import DEVICE_FIELDS, build
from hnet.train.config import InitConfig, MeshConfig, OptimConfig, RateControlConfig
from hnet.train.evaluate import evaluate
from hnet.train.initial import open_start, replaced
from hnet.train.optim import (
    Hyperparams,
    Length,
    apply_update,
    average,
    direction,
    optimizer,
    schedule,
    targets_at,
)
from hnet.train.step import eval_step
from tests.networks import optimized_jit, quick_jit
from tests.training import TINY, rows, run, tiny_run


def test_wsd_warms_up_stays_and_decays_as_one_minus_sqrt():
    config = OptimConfig(schedule="wsd", warmup_frac=0.1, decay_frac=0.2)
    length = Length.of(config, 100)
    factors = [float(schedule(config, jnp.int32(s), length)) for s in range(100)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9:80] == pytest.approx([1.0] * 71)
    assert factors[80:83] == pytest.approx([1 - np.sqrt(k / 21) for k in (1, 2, 3)])
    assert 0 < factors[99] < 0.03
    assert all(a >= b for a, b in zip(factors[80:], factors[81:]))


def test_cosine_goes_to_zero():
    config = OptimConfig(schedule="cosine", warmup_frac=0.1)
    length = Length.of(config, 100)
    factors = [float(schedule(config, jnp.int32(s), length)) for s in range(101)]
    assert factors[9] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.5, abs=0.01)
    assert factors[100] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", ["wsd", "cosine"])
def test_bits_of_a_traced_length_are_those_of_a_constant(name):
    # XLA multiplies by the reciprocal of a constant; a division by a traced number rounds otherwise
    config = OptimConfig(schedule=name)
    traced = optimized_jit(lambda step, length: schedule(config, step, length))
    for num_steps in (180, 113, 7):
        length = Length.of(config, num_steps)
        constant = optimized_jit(lambda step, length=length: schedule(config, step, length))
        for step in map(jnp.int32, range(num_steps)):
            assert traced(step, length) == constant(step), int(step)


def test_a_run_of_another_length_is_the_same_program(tmp_path):
    """Schedule, moving targets and the start of the controller are inputs of the compiled step."""
    outer, main = TINY.stages
    held = replace(outer, chunking=replace(outer.chunking, hold_rate=True))
    base = tiny_run(
        tmp_path, model=replace(TINY, stages=(held, main)),
        rate_control=RateControlConfig(start_ratios=(2.0,)),
    )  # fmt: skip
    traced = []
    for steps in (8, 13):
        program = build(replace(base, train=replace(base.train, steps=steps)))
        fed = {
            name: jax.ShapeDtypeStruct((8, 32), dtype)
            for name, dtype in (
                ("input_ids", "int32"),
                ("segment_ids", "int32"),
                ("loss_mask", "bool"),
            )
        }
        how = program.step.lower(program.abstract_state, fed, program.hparams, capacities=(64,))
        traced.append(how.as_text())
    assert traced[0] == traced[1]


def test_stages_and_decay_of_the_two_stage_network_follow_the_official_groups():
    infos = describe(nnx.merge(*abstract(PUBLISHED["2stage_L"])))
    stages, decayed = {}, {}
    for path, info in jax.tree_util.tree_leaves_with_path(infos):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stages[name], decayed[name] = info.stage, info.decay
    assert stages["embeddings/embedding"] == stages["lm_head/kernel"] == 0
    assert stages["backbone/encoder/layers/0/mixer/in_proj/kernel"] == 0
    assert stages["backbone/routing_module/q_proj_layer/kernel"] == 0
    assert stages["backbone/main_network/decoder/layers/1/mlp/fc1/kernel"] == 1
    assert stages["backbone/main_network/residual_proj/kernel"] == 1
    assert stages["backbone/main_network/main_network/pad_dimension"] == 2
    assert stages["backbone/main_network/main_network/main_network/rmsnorm/scale"] == 2
    spared = {name.rsplit("/", 1)[1] for name, is_d in decayed.items() if not is_d}
    assert spared == {"scale", "bias", "A_log", "D", "dt_bias", "conv1d_bias"}


def test_update_equals_optax_adamw_when_all_stages_are_alike():
    config = OptimConfig(clip_norm=0.7, weight_decay=0.13)
    rng = np.random.default_rng(0)
    names = {"lm_head": {"kernel": (3, 5)}, "norm": {"scale": (5,)}}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    is_shape = lambda x: isinstance(x, tuple)
    params = jax.tree.map(draw, names, is_leaf=is_shape)
    decayed = {"lm_head": {"kernel": True}, "norm": {"scale": False}}
    infos = jax.tree.map(lambda decay: ParameterInfo(("out",), decay, stage=0), decayed)
    reference = optax.chain(
        optax.clip_by_global_norm(0.7),
        optax.adamw(2e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.13, mask=decayed),
    )
    hparams = Hyperparams(jnp.float32(2e-3), jnp.float32(0.13), jnp.ones(1), 0.0)
    ours, theirs = params, params
    state, reference_state = optimizer(config, infos).init(params), reference.init(params)
    for _ in range(3):
        grads = jax.tree.map(draw, names, is_leaf=is_shape)
        directions, state = direction(config, infos, grads, state)
        ours = apply_update(ours, directions, infos, hparams, jnp.float32(1.0))
        with jax.numpy_dtype_promotion("standard"):
            updates, reference_state = reference.update(grads, reference_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_multiplier_scales_only_the_step_of_its_stage():
    params = {"backbone": {"encoder": jnp.ones(2), "main_network": {"w": jnp.ones(2)}}}
    hparams = Hyperparams(jnp.float32(0.1), jnp.float32(0.0), jnp.array([3.0, 0.5]), 0.0)
    outer, inner = (ParameterInfo(("out",), stage=stage) for stage in (0, 1))
    infos = {"backbone": {"encoder": outer, "main_network": {"w": inner}}}
    ones = jax.tree.map(jnp.ones_like, params)
    out = apply_update(params, ones, infos, hparams, jnp.float32(1.0))
    np.testing.assert_allclose(out["backbone"]["encoder"], 1 - 0.3, rtol=1e-6)
    np.testing.assert_allclose(out["backbone"]["main_network"]["w"], 1 - 0.05, rtol=1e-6)


def test_multipliers_by_formula_none_and_explicit():
    assert OptimConfig(lr_multipliers="none").multipliers(TINY) == (1.0, 1.0)
    assert OptimConfig(lr_multipliers=(2.0, 1.0)).multipliers(TINY) == (2.0, 1.0)
    formula = OptimConfig().multipliers(PUBLISHED["2stage_L"])
    assert formula == pytest.approx((2.63, 1.52, 0.71), abs=0.01)
    with pytest.raises(ConfigError, match="lr_multipliers.*3 numbers for 2 stages"):
        OptimConfig(lr_multipliers=(1.0, 1.0, 1.0)).multipliers(TINY)
    with pytest.raises(ConfigError, match="optim.learning_rate=0"):
        OptimConfig(learning_rate=0.0)


def slow_muon(grads: list[np.ndarray], momentum: float) -> list[np.ndarray]:
    """Directions of one matrix, in float64 and one product after the other."""
    mean, found = np.zeros_like(grads[0]), []
    for t, grad in enumerate(grads, 1):
        mean = momentum * mean + (1 - momentum) * grad
        ahead = momentum * mean / (1 - momentum ** (t + 1)) + (1 - momentum) * grad / (
            1 - momentum**t
        )
        x = ahead / (np.linalg.norm(ahead) + 1e-8)
        x = x.T if x.shape[0] > x.shape[1] else x
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x.T if ahead.shape[0] > ahead.shape[1] else x
        found.append(0.2 * np.sqrt(max(x.shape)) * x)
    return found


def test_muon_equals_a_plain_loop_on_matrices_and_adam_elsewhere():
    """A stack of two wide matrices, a tall one, a vector, an embedding, and a frozen matrix."""
    shapes = {
        "stack": (2, 5, 7),
        "tall": (11, 3),
        "scale": (5,),
        "table": (13, 5),
        "frozen": (3, 3),
    }
    axes = {"stack": "embed out", "tall": "mlp out", "scale": "out", "table": "vocab embed"}
    infos = {name: ParameterInfo(tuple(text.split()), stage=0) for name, text in axes.items()}
    infos["frozen"] = ParameterInfo(("embed", "out"), stage=0, frozen=True)
    rng = np.random.default_rng(3)
    draws = [{n: rng.normal(size=s) / 50 for n, s in shapes.items()} for _ in range(3)]
    config, plain = (
        OptimConfig(name="muon", momentum=0.9, clip_norm=1e3),
        OptimConfig(clip_norm=1e3),
    )
    as_tree = lambda draw: {n: None if n == "frozen" else jnp.float32(x) for n, x in draw.items()}
    state = optimizer(config, infos).init(as_tree(draws[0]))
    adam_state = optimizer(plain, infos).init(as_tree(draws[0]))
    wanted = {
        "tall": slow_muon([d["tall"] for d in draws], 0.9),
        **{i: slow_muon([d["stack"][i] for d in draws], 0.9) for i in range(2)},
    }
    for t, draw in enumerate(draws):
        ours, state = direction(config, infos, as_tree(draw), state)
        adam, adam_state = direction(plain, infos, as_tree(draw), adam_state)
        assert ours["frozen"] is None
        np.testing.assert_allclose(ours["tall"], wanted["tall"][t], rtol=0, atol=2e-5)
        for i in range(2):
            np.testing.assert_allclose(ours["stack"][i], wanted[i][t], rtol=0, atol=2e-5)
        for name in ("scale", "table"):
            assert np.array_equal(ours[name], adam[name])
    assert len(jax.tree.leaves(state)) < len(jax.tree.leaves(adam_state)) + 4  # one moment each


def test_average_soon_forgets_the_initialisation_and_then_has_its_decay():
    ema, slow = {"w": jnp.float32([3.0, -1.0])}, np.array([3.0, -1.0])
    for t in range(20):
        params = np.array([t, 1.0])
        ema = average(ema, {"w": jnp.float32(params)}, jnp.float32(0.6), jnp.int32(t))
        decay = min(0.6, (1 + t) / (10 + t))
        slow = decay * slow + (1 - decay) * params
    np.testing.assert_allclose(ema["w"], slow, rtol=1e-6)


def test_targets_move_linearly_and_stay():
    length = Length.of(OptimConfig(), 10)
    start = jnp.float32([2.0, 9.0])
    hparams = Hyperparams(0.0, 0.0, 0.0, 0.0, 0.0, start, jnp.float32(0.5), length=length)
    numbers = ({"target_ratio_R": jnp.float32([6.0, 4.0])}, {"target_ratio_R": jnp.float32([3.0])})
    for step, x in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        first, second = targets_at(hparams, numbers, jnp.int32(step))
        np.testing.assert_allclose(first["target_ratio_R"], [2 + 4 * x, 2 + 2 * x], rtol=1e-6)
        np.testing.assert_allclose(second["target_ratio_R"], [9 - 6 * x], rtol=1e-6)


@pytest.fixture(scope="module")
def all_options(tmp_path_factory):
    """A run with Muon, an average that evaluations use, a target that moves, a frozen encoder."""
    outer, main = TINY.stages
    exportable = (replace(outer, arch_layout=("t1", "t1")), main)
    config = tiny_run(
        tmp_path_factory.mktemp("run"),
        model=replace(TINY, stages=exportable, ssm=SSMConfig()),
        optim=OptimConfig(name="muon", learning_rate=3e-3, ema_decay=0.7),
        rate_control=RateControlConfig(start_ratios=(2.0,), ramp_frac=0.5),
        init=InitConfig(freeze=("encoder",)),
    )
    config = replace(config, eval=replace(config.eval, ema=True))
    return config, run(config)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_everything_of_the_optimizer_is_resumed_bit_for_bit(all_options, tmp_path):
    config, whole = all_options
    config = replace(config, workdir=str(tmp_path))
    run(config, stop=types.SimpleNamespace(stop_requested=lambda step: step >= 4))
    again = run(config)
    assert rows(config) == rows(all_options[0])
    for name in ("params", "opt_state", "ema"):
        ours, theirs = getattr(again.state, name), getattr(whole.state, name)
        assert all(map(np.array_equal, leaves(ours), leaves(theirs)))
    first, last = (s.params["backbone"]["encoder"] for s in (whole.program.init(), again.state))
    assert all(map(np.array_equal, leaves(first), leaves(last)))
    assert "encoder" not in " ".join(flatten(again.state.opt_state)[0])
    assert [row["stage0/target_rate"] for row in rows(config)] == pytest.approx(
        [1 / (2 + x) for x in (0, 1 / 3, 2 / 3, 1, 1, 1, 1, 1)]
    )


def test_the_average_is_evaluated_loaded_and_exported(all_options, tmp_path):
    config, outcome = all_options
    model = load(config.workdir, ema=True)
    assert all(map(np.array_equal, leaves(split(model)[1]), leaves(outcome.state.ema)))
    start = partial(open_start, graph=outcome.program.graph, abstract_params=outcome.state.params)
    found = replaced(outcome.state.params, start(InitConfig(config.workdir, ema=True)))
    assert all(map(np.array_equal, leaves(found), leaves(outcome.state.ema)))
    batches = eval_batches(outcome.corpus.heldout, config.data)
    compiled = quick_jit(
        partial(eval_step, graph=outcome.program.graph), static_argnames="capacities"
    )
    step = lambda batch, capacities: compiled(
        outcome.state.ema, {n: batch[n] for n in DEVICE_FIELDS if n in batch},
        capacities=capacities,
    )  # fmt: skip
    assert evaluate(batches, step, (None,)).bpb == pytest.approx(outcome.evaluation.bpb, rel=1e-6)
    convert(config.workdir, tmp_path / "ema.npz", ema=True)
    found = dict(np.load(tmp_path / "ema.npz"))
    np.testing.assert_array_equal(
        found["embeddings.weight"], outcome.state.ema["embeddings"]["embedding"]
    )
    file = tmp_path / "ema.npz"
    for what in (
        lambda: load(tmp_path, ema=True), lambda: load(file, ema=True),
        lambda: start(InitConfig(str(file), ema=True)), lambda: InitConfig(ema=True),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            what()


@pytest.mark.every
def test_muon_is_the_same_on_a_mesh(all_options, tmp_path):
    config, whole = all_options
    config = replace(config, workdir=str(tmp_path), mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    meshed = run(config)
    for ours, theirs in zip(leaves(meshed.state.params), leaves(whole.state.params)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("section", "changes", "told"), [
    ("eval", {"ema": True}, "eval.ema=True, but optim.ema_decay=0.0 keeps no average"),
    ("rate_control", {"start_ratios": (2.0, 3.0)}, "start_ratios.* has 2 numbers for 1 stages"),
    ("optim", {"ema_decay": 1.0}, "optim.ema_decay=1.0"),
    ("rate_control", {"start_ratios": (0.5,)}, "rate_control.start_ratios"),
])  # fmt: skip
def test_options_that_cannot_work_are_named(tmp_path, section, changes, told):
    config = tiny_run(tmp_path)
    with pytest.raises(ConfigError, match=told):
        replace(config, **{section: replace(getattr(config, section), **changes)})
