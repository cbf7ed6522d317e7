"""Starting from weights: what is copied from where, frozen parameters, resume, refusals."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import evaluate
from experiments.finetune import __main__ as finetune
from hnet.checkpoint import leaves
from hnet.config import ChunkingConfig, HNetConfig
from hnet.errors import ConfigError
from hnet.interop import load, to_official
from hnet.model import abstract, init_params
from hnet.nn.parameters import describe
from hnet.runtime.stop_request import StopRequest
from hnet.second_model.entropy import Entropy
from hnet.train import loop
from hnet.train.config import EvalConfig, InitConfig, MeshConfig, OptimConfig, TrainConfig
from hnet.train.initial import collapsed, matches, module_of, open_start, plan, replaced
from hnet.train.metrics_file import read_metrics
from hnet.train.named import run_config
from hnet.train.parallel_program import build as build_runs
from hnet.train.run_logger import RunLogger
from hnet.train.workdir import changes
from hnet.weights.sources import resolve
from hnet.weights.tensors import write_tensors
from tests.checkpoint.states import biggest_file
from tests.networks import QUICK, official_network, quick_jit
from tests.train.test_workdir import StopAt, contents
from tests.training import ATTENTION, build, build_once, rows, run, tiny_run

STEPS = 4
FLAT = HNetConfig(
    (replace(ATTENTION.stages[1], arch_layout=("T1",)),),
    ssm=ATTENTION.ssm,
    compute=ATTENTION.compute,
)
OUTER = replace(ATTENTION.stages[0], chunking=ChunkingConfig(3.0, routes=3, hold_rate=True))
ROUTED = replace(
    ATTENTION, stages=(OUTER, ATTENTION.stages[1]), route_groups=(("Cyrillic",), ("Devanagari",))
)
DEEP = replace(ATTENTION, stages=(ATTENTION.stages[0], *ATTENTION.stages))


def shapes(model):
    return {path: leaf.shape for path, leaf in leaves.flatten(abstract(model)[1])[0].items()}


def planned(model, saved, **fields):
    graph, params = abstract(model)
    infos = leaves.flatten(describe(nnx.merge(graph, params)))[0]
    return plan(InitConfig("old", **fields), shapes(model), infos, shapes(saved))


def refused(model, saved, **fields):
    with pytest.raises(ConfigError) as error:
        planned(model, saved, **fields)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900
    return str(error.value)


def test_equal_architectures_need_no_map():
    assert planned(ATTENTION, ATTENTION).source == {path: path for path in shapes(ATTENTION)}
    some = planned(ATTENTION, ATTENTION, new=("routing_module", "*.norm1.scale"))
    assert some.fresh == tuple(
        sorted(p for p in shapes(ATTENTION) if "routing_module" in p or p.endswith("norm1/scale"))
    )
    assert len(some.fresh) == 5 and set(some.source) == set(shapes(ATTENTION)) - set(some.fresh)


def test_a_flat_model_becomes_the_innermost_part_of_a_deeper_one():
    wider = replace(FLAT, stages=(replace(FLAT.stages[0], d_model=16),))
    other = refused(ATTENTION, FLAT)
    assert "missing there: decoder, encoder, main_network.main_network, main_network.pad" in other
    assert "only there: main_network.layers, main_network.rmsnorm;" in other
    assert "embeddings.embedding (256, 24) there, (256, 16) here" in other
    fresh = ("encoder", "decoder", "routing_module", "residual_proj", "*.pad_dimension")
    fresh += ("embeddings", "lm_head")
    grown = planned(ATTENTION, FLAT, map=("main_network=main_network",), new=fresh)
    inner = "backbone/main_network/main_network/"
    assert grown.source == {
        p: p.replace("main_network/", "", 1) for p in shapes(ATTENTION) if p.startswith(inner)
    }
    assert len(grown.source) == 7
    same = planned(ATTENTION, FLAT, map=("main_network.main_network=main_network",), new=fresh)
    assert same == grown
    assert "Wqkv.kernel (1, 16, 48) there, (1, 24, 72) here" in refused(
        ATTENTION, wider, map=("main_network=main_network",), new=fresh
    )


def test_a_stage_becomes_an_inner_stage_and_is_used_once():
    named = "encoder, residual_proj, routing_module"
    new = ("decoder", "encoder", "residual_proj", "routing_module")
    assert f"missing there: decoder, {named}:" in refused(
        DEEP, ATTENTION, map=("main_network=backbone",)
    )
    grown = planned(DEEP, ATTENTION, map=("main_network=backbone",), new=new)
    assert grown.source["backbone/main_network/encoder/rmsnorm/scale"] == (
        "backbone/encoder/rmsnorm/scale"
    )
    assert set(grown.source.values()) == set(shapes(ATTENTION))
    back = planned(
        ATTENTION, DEEP, map=("backbone=main_network", "=encoder", "=decoder", "=residual_proj",
                         "=routing_module")
    )  # fmt: skip
    assert back.source == {v: k for k, v in grown.source.items()}


def test_a_router_is_copied_to_each_route_when_told():
    message = refused(ROUTED, ATTENTION)
    assert "routing_module.q_proj_layer.kernel (16, 16) there, (3, 16, 16) here" in message
    assert "missing there: boundary_offset;" in message
    fields = {"map": ("routing_module=routing_module",), "new": ("boundary_offset",)}
    assert set(planned(ROUTED, ATTENTION, **fields).source) == set(shapes(ATTENTION))
    assert "(3, 16, 16) there, (16, 16) here" in refused(
        ATTENTION, ROUTED, map=("routing_module=routing_module", "=boundary_offset")
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"new": ("encoder.x",)}, "init.new='encoder.x' matches no parameter: did you mean enc"),
        ({"map": ("decoderr=encoder",)}, "'decoderr' is no parameter: did you mean decoder?"),
        ({"map": ("decoder=7",)}, "'7' is no parameter: use one of decoder, encoder, "),
        ({"map": ("encoder",)}, "init.map='encoder': write NEW=OLD, or =OLD to leave OLD out"),
        ({"map": ("encoder=",)}, "init.map='encoder=': write NEW=OLD"),
    ],
)
def test_names_that_are_not_there(fields, message):
    assert message in refused(ATTENTION, ATTENTION, **fields)


def test_names_of_modules():
    paths = list(shapes(DEEP))
    assert collapsed(paths, paths, paths[:1])[-2:] == ["embeddings", "lm_head"]
    assert collapsed([p for p in paths if "mlp" in p], paths, ()) == [
        "main_network.main_network.main_network.layers.0.mlp"
    ]
    assert matches("main_network", "backbone/main_network/encoder/rmsnorm/scale")
    assert matches("backbone.encoder", "backbone/encoder/rmsnorm/scale")
    assert not matches("encoder", "backbone/main_network/encoder/rmsnorm/scale")
    assert not matches("enc", "backbone/encoder/rmsnorm/scale")
    assert [module_of(p) for p in ("backbone/main_network/layers/0/norm1/scale", "lm_head/kernel",
                                   "backbone/main_network/main_network/rmsnorm/scale",
                                   "backbone/main_network/pad_dimension")] == [
        "main_network", "lm_head", "main_network.main_network", "main_network.pad_dimension"
    ]  # fmt: skip


# --- runs -----------------------------------------------------------------------------------------


def train(config, stop=None, program=None):
    """`run` on one device, with a program that is compiled already if given."""
    if program is None:
        return run(config, stop, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch, StopRequest() as request:
        patch.setattr(loop, "build", lambda config: program)
        return loop.train(config, stop or request)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """A run of four steps and its state."""
    folder = tmp_path_factory.mktemp("old")
    config = tiny_run(folder / "run", train=TrainConfig(steps=STEPS, log_every=1))
    return config, train(config)


def tuned_config(old, workdir, **changes):
    """A run from the weights of `old`, with another batch and a frozen main network."""
    config = replace(
        old[0],
        workdir=str(workdir),
        init=InitConfig(f"{old[0].workdir}@{STEPS}", freeze=("main_network",)),
        optim=OptimConfig(learning_rate=1e-2),
        eval=EvalConfig(every=STEPS, probe_bytes=20),
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def tuned(old, tmp_path_factory):
    """The run from its weights: configuration, outcome, evaluations and lines by step."""
    config, seen = tuned_config(old, tmp_path_factory.mktemp("tuned")), ({}, [])

    def evaluated(self, step, evaluation, *shown, **how):
        seen[0][step] = evaluation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLogger, "evaluated", evaluated)
        patch.setattr(RunLogger, "say", lambda self, text: seen[1].append(text))
        return config, train(config), *seen


def test_a_start_scores_what_the_checkpoint_scores(old, tuned, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", old[0].workdir, "--json", "True"])
    evaluate.main()
    bpb = json.loads(capsys.readouterr().out)["bpb"]
    assert abs(tuned[2][0].bpb - bpb) < 1e-4
    assert abs(tuned[2][STEPS].bpb - bpb) > 1e-2


def test_frozen_parameters_keep_their_bits_and_have_no_optimizer_state(old, tuned):
    _, outcome, _, lines = tuned
    before, after = (leaves.flatten(o.state.params)[0] for o in (old[1], outcome))
    for path in before:
        is_same = np.array_equal(before[path], after[path])
        assert is_same == path.startswith("backbone/main_network/"), path
    moments = list(leaves.flatten(outcome.state.opt_state)[0])
    assert len(moments) == 1 + 2 * sum("main_network" not in path for path in before)
    assert not any("main_network" in path for path in moments)
    head = next(i for i, line in enumerate(lines) if line.startswith("starts from "))
    assert lines[head].endswith(f"run, step {STEPS}: 22,688 parameters, 11,600 of them frozen")
    table = [line.split() for line in lines[head + 1 :]]
    assert ["main_network.main_network", "11,592", "frozen", "main_network.main_network"] in table
    assert ["encoder", "1,056", "trained", "encoder"] in table


def test_a_stopped_run_resumes_without_the_weights_it_started_from(old, tuned, tmp_path):
    """Stopped before the first update and after the second: the same bits and logs."""
    source = tmp_path / "source"
    shutil.copytree(old[0].workdir, source)
    init = replace(tuned[0].init, from_=str(source))
    config = replace(tuned[0], workdir=str(tmp_path / "new"), init=init)
    program = tuned[1].program
    assert train(config, StopAt(0), program).evaluation is None
    shutil.rmtree(source)
    assert train(config, StopAt(2), program).evaluation is None
    assert run_config(["--init.from", str(source), "--workdir", config.workdir]).model == ATTENTION
    resumed = train(config, None, program)
    data = lambda state: jax.device_get(state._replace(key=jax.random.key_data(state.key)))
    jax.tree.map(np.testing.assert_array_equal, data(resumed.state), data(tuned[1].state))
    assert rows(config)[:-1] == rows(tuned[0])[:-1]
    other = replace(config, init=replace(init, freeze=()))
    with pytest.raises(ConfigError, match="init.freeze="):
        changes(other)


def test_a_resumed_run_with_other_data_is_told_how_to_start_from_its_weights(old):
    other = replace(old[0], data=replace(old[0].data, batch_size=16))
    before = contents(Path(old[0].workdir))
    with pytest.raises(ConfigError) as error:
        train(other)
    way = f"--init.from {old[0].workdir} --workdir NEW"
    assert str(error.value).startswith("data.batch_size=16, but the run in workdir=")
    assert str(error.value).endswith(way) and contents(Path(old[0].workdir)) == before


def test_a_mesh_gets_the_parameters_as_it_shards_them(old, tmp_path):
    config = replace(tuned_config(old, tmp_path / "x"), mesh=MeshConfig(2, 2))
    program = build(config, devices=jax.devices()[:4])
    init = replace(config.init, from_=f"{old[0].workdir}/checkpoints/{STEPS}")
    start = open_start(init, program.graph, program.abstract_state.params)
    found = replaced(program.init().params, start)
    expected = jax.device_get(old[1].state.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), expected)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(), found, program.shardings.params)
    sharded = found["backbone"]["encoder"]["layers"][0]["mixer"]["Wqkv"]["kernel"]
    assert sharded.addressable_shards[0].data.size * 2 == sharded.size


def test_an_official_file_says_its_architecture_and_gives_its_parameters(tmp_path):
    model = official_network((32, "m1 m2"), (48, "T2"))
    params = quick_jit(lambda key: init_params(model, key))(jax.random.key(7))
    content, tensors = to_official(nnx.merge(abstract(model)[0], params))
    write_tensors(tmp_path / "w.npz", tensors)
    (tmp_path / "w.json").write_text(json.dumps(content))
    config = run_config(["--init.from", str(tmp_path / "w.npz"), "--model.stages.0.num_heads", "2"])
    assert config.model.stages[0] == replace(model.stages[0], num_heads=2)
    assert config.data.bos_eos and config.model.stages[1] == model.stages[1]
    placed = on_one_device(jax.tree.map(jnp.zeros_like, params))
    start = open_start(config.init, *abstract(model))
    jax.tree.map(np.testing.assert_array_equal, replaced(placed, start), params)


def on_one_device(params):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    return jax.device_put(params, jax.NamedSharding(mesh, jax.P()))


def test_all_runs_of_a_program_start_from_the_weights(old, tmp_path):
    config = replace(tuned_config(old, tmp_path), mesh=MeshConfig(data=1))
    both = [config, replace(config, seed=1)]
    program = build_runs(both, devices=jax.devices()[:1], compiler_options=QUICK)
    params = program.abstract_state.params
    start = open_start(config.init, program.graph, params, runs=True)
    found = jax.device_get(replaced(program.init().params, start))
    before = jax.device_get(old[1].state.params)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.stack([y, y])), found, before)


def test_one_router_copied_to_each_route_gives_the_same_logits(old, tmp_path):
    init = InitConfig(old[0].workdir, ("routing_module=routing_module",), ("boundary_offset",))
    graph, shape = abstract(ROUTED)
    fresh = quick_jit(lambda key: init_params(ROUTED, key))(jax.random.key(0))
    params = replaced(on_one_device(fresh), open_start(init, graph, shape))
    rng = np.random.default_rng(0)
    ids_BL, routes_BL = (jnp.asarray(rng.integers(0, n, (3, 29)), jnp.int32) for n in (256, 3))

    @quick_jit
    def both(params, old_params):
        routed, records = nnx.merge(graph, params)(ids_BL, route_ids_BL=routes_BL)
        single, expected = nnx.merge(abstract(ATTENTION)[0], old_params)(ids_BL)
        return routed, single, records[0].boundary_mask_BL, expected[0].boundary_mask_BL

    routed, single, mask, expected = both(params, jax.device_get(old[1].state.params))
    np.testing.assert_allclose(routed, single, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(mask, expected)
    assert 0 < int(mask.sum()) < mask.size


REFUSED = {
    "no folder": ("{none}", "does not exist: give a work directory, WORKDIR@STEP, or a file"),
    "no run": ("{tmp}", "has no config.json: it is no work directory"),
    "no step": ("{old}@7", "there is no checkpoint of step 7: \\[0, 4\\]|step 7: \\[4\\]"),
    "no file": ("{none}.pt", "none.pt' does not exist"),
    "hub": (
        "hf://owner/name",
        "'hf://owner/name'(: the Hub cannot be used| needs huggingface_hub)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_places_without_weights_are_one_line_and_nothing_is_written(
    old, tmp_path, name, monkeypatch
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path.parent / "cache"))
    given, message = REFUSED[name]
    given = given.format(none=tmp_path / "none", tmp=tmp_path, old=old[0].workdir)
    config = tuned_config(old, tmp_path / "new", init=InitConfig(given))
    before = contents(tmp_path)
    for start in (lambda: train(config), lambda: run_config(["--init.from", given])):
        if name == "no step" and "run_config" in start.__code__.co_names:
            continue
        with pytest.raises(ConfigError, match=message) as error:
            start()
        assert "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_another_architecture_and_damage_are_refused_and_nothing_is_written(old, tuned, tmp_path):
    config = tuned_config(old, tmp_path / "new", model=DEEP, init=InitConfig(old[0].workdir))
    with pytest.raises(ConfigError, match="has another architecture; missing there: main_network"):
        train(config)
    source = tmp_path / "damaged"
    shutil.copytree(old[0].workdir, source)
    os.truncate(biggest_file(source / "checkpoints" / "4"), 100)
    for given, message in ((f"{source}@4", "has 100 bytes, its"), (f"{source}", "no usable check")):
        config = tuned_config(old, tmp_path / "new", init=InitConfig(given))
        with pytest.raises(ConfigError, match=message):
            train(config, program=tuned[1].program)
    with pytest.raises(ConfigError, match="init.freeze=.*nothing is left to train"):
        train(tuned_config(old, tmp_path / "new", init=InitConfig(freeze=("*",))))
    with pytest.raises(ConfigError, match="init.ema=True: the run in .* kept no average"):
        train(tuned_config(old, tmp_path / "new", init=InitConfig(old[0].workdir, ema=True)))
    with pytest.raises(ConfigError, match="init.new is given without init.from"):
        InitConfig(new=("x",))
    assert not (tmp_path / "new").exists()


def test_spellings_of_a_step(old, monkeypatch):
    run_at = old[0].workdir
    assert resolve(run_at) == (run_at, None, True)
    steps = f"{run_at}@4", f"{run_at}/checkpoints/4", f"{run_at}/checkpoints/4/"
    assert {resolve(path) for path in steps} == {(run_at, 4, True)}
    monkeypatch.chdir(f"{run_at}/checkpoints")
    assert resolve("4") == (run_at, 4, True)
    for path in (f"{run_at}@5", f"{run_at}/checkpoints/5"):
        with pytest.raises(ConfigError, match="there is no checkpoint of step 5"):
            load(path)
    assert Entropy.Config(f"{run_at}@4").language_model == ATTENTION


@pytest.mark.every
def test_the_study_prints_a_row_for_each_text_and_trains_a_run_once(
    old, tmp_path, monkeypatch, capsys
):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} tale of cats and other animals. " * 20)
    words = ["--init.from", old[0].workdir, "--seeds", "1", "--rows", "inner-frozen"]
    words += ["--text", f"Tale={tmp_path}/a.txt:{tmp_path}/b.txt", "--workdir", str(tmp_path / "w")]
    words += ["--train.steps", "1", "--data.seq_len", "32", "--eval.every", "0"]
    monkeypatch.setattr(loop, "build", build_once)
    monkeypatch.setattr(sys, "argv", ["finetune", *words])
    assert finetune.main() == 0
    (row,) = read_metrics(tmp_path / "w" / "Tale" / "0" / "inner-frozen")
    said = capsys.readouterr().out
    assert "11,592  frozen   main_network.main_network" in said
    assert said.splitlines()[-1].split() == ["Tale", f"{row['eval/bpb']:.4f}"]
    monkeypatch.setattr(finetune, "train_to_end", lambda config: pytest.fail("trained again"))
    assert finetune.main() == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "Tale"
    monkeypatch.setattr(sys, "argv", ["finetune", *words, "--text", "Tale"])
    with pytest.raises(ConfigError, match="text='Tale': write NAME=TRAIN:HELDOUT"):
        finetune.main()
