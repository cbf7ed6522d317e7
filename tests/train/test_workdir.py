"""A work directory: what a start reads, may change and prints; what a refused start leaves."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import entropy_threshold
from hnet.checkpoint.step_folders import work_folder
from hnet.commands.evaluate import EvaluateConfig, _part
from hnet.data import open_corpus
from hnet.data.identity import read_inputs
from hnet.errors import ConfigError, Failed
from hnet.runtime import distributed
from hnet.train import loop, workdir
from hnet.train.config import CheckpointConfig, MeshConfig, ProfileConfig, TrainConfig
from hnet.train.lock import DirectoryLock, Locked
from hnet.train.parallel_runs import train_parallel_runs
from hnet.train.run_logger import RunLogger
from hnet.train.workdir import changes, claim_workdir, locked_workdir, read_config, run_inputs
from hnet.weights.sources import resolve
from tests.training import rows, run, tiny_run


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


class StopAt:
    def __init__(self, step):
        self.step = step

    def stop_requested(self, step):
        return step >= self.step


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of four steps."""
    config = tiny_run(tmp_path_factory.mktemp("ended"), train=TrainConfig(steps=4, log_every=1))
    return config, run(config)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(RunLogger, "say", lambda self, text: lines.append(text))
    return lines


def test_a_run_stores_what_it_read(ended):
    config, outcome = ended
    assert read_inputs(config.workdir) == {"data.files": outcome.corpus.fingerprint}


def test_evaluate_names_the_option_whose_file_is_missing(ended):
    config, _ = ended
    options = EvaluateConfig(config.workdir, files=("missing",))
    with pytest.raises(ConfigError, match="^files: 'missing' matches no file"):
        _part(options, resolve(config.workdir))


def test_fewer_steps_than_were_done_are_refused_with_both_numbers(ended):
    config, _ = ended
    before = contents(Path(config.workdir))
    shorter = replace(config, train=TrainConfig(steps=3, log_every=1))
    with pytest.raises(ConfigError, match=r"train.steps=3, but the run in workdir=.* has done 4 "):
        run(shorter)
    assert contents(Path(config.workdir)) == before
    with pytest.raises(ConfigError, match="train.steps=3, but the run in workdir=x has done 4 "):
        workdir.check_steps(shorter, "x", 4)


def test_an_ended_run_told_something_else_says_that_it_has_no_effect(ended, said):
    config, outcome = ended
    before = contents(Path(config.workdir))
    other = replace(config, optim=replace(config.optim, learning_rate=0.25))
    again = run(other)
    assert again.evaluation.bpb == outcome.evaluation.bpb
    assert contents(Path(config.workdir)) == before
    (line,) = [line for line in said if "learning_rate" in line]
    assert line.startswith("optim.learning_rate=0.25 (it was 0.003): no effect, as the run in ")
    assert "ended at step 4" in line and "larger train.steps" in line


def test_a_run_that_goes_on_with_other_settings_says_which(ended, tmp_path, said):
    config = replace(ended[0], workdir=str(tmp_path))
    run(config, StopAt(2))
    former = (tmp_path / "config.json").read_bytes()
    other = replace(config, optim=replace(config.optim, learning_rate=0.25), mesh=MeshConfig(1))
    run(other)
    assert [line.partition(" from step 2 on; former settings: config-1.json")[0]
            for line in said if "former settings" in line] == [
        "optim.learning_rate=0.25 (it was 0.003)", "mesh.data=1 (it was -1)"
    ]  # fmt: skip
    assert (tmp_path / "config-1.json").read_bytes() == former
    assert read_config(tmp_path) == other
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4]


def test_the_deepest_field_that_differs_is_named_with_its_two_values(tmp_path):
    config = tiny_run(tmp_path)
    claim_workdir(config)
    outer, inner = config.model.stages

    def refused(**fields):
        model = replace(config.model, **fields)
        with pytest.raises(ConfigError) as e:
            changes(replace(config, model=model))
        assert "\n" not in str(e.value) and len(str(e.value)) < 400
        return str(e.value)

    other = replace(outer, chunking=replace(outer.chunking, target_ratio=5.0))
    assert refused(stages=(other, inner)).startswith(
        "model.stages.0.chunking.target_ratio=5.0, but the run in workdir="
    )
    assert "has 3.0: use that value" in refused(stages=(other, inner))
    assert refused(stages=(outer, outer, inner)).startswith("model.stages=(3 of them), but the run")
    assert "arch_layout.0='m2'" in refused(stages=(replace(outer, arch_layout=("m2", "m1")), inner))
    assert changes(replace(config, workdir=str(tmp_path / "."))) == []


def test_a_file_that_is_no_configuration_is_named(tmp_path):
    for content in ('{"my": "settings"}', "{}", "[1]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=f"^{tmp_path}/config.json cannot be read: "):
            read_config(tmp_path)


def test_a_second_start_is_refused_while_the_first_one_runs(ended, tmp_path):
    config = replace(ended[0], workdir=str(tmp_path))
    with DirectoryLock(tmp_path):
        before = contents(tmp_path)
        for start in (run, lambda c: train_parallel_runs([c, c], c.workdir, StopAt(0))):
            with pytest.raises(Locked, match="is in use by process"):
                start(config)
        assert contents(tmp_path) == before


@pytest.fixture
def named(tmp_path):
    """Files of a run by setting, with their contents."""
    files = {"data.files": "a.txt", "eval.probe_files": "probe.jsonl"}
    (tmp_path / "a.txt").write_text("text " * 200)
    (tmp_path / "probe.jsonl").write_text('{"text": "a b", "spans": []}\n')
    return {field: tmp_path / name for field, name in files.items()}


def run_over(named, workdir):
    config = tiny_run(workdir)
    text, probes = map(str, named.values())
    return replace(
        config,
        data=replace(config.data, files=(text,)),
        eval=replace(config.eval, probe_files=(probes,)),
    )


@pytest.mark.parametrize("field", ["data.files", "eval.probe_files"])
def test_other_content_of_the_same_name_is_refused_with_both_fingerprints(
    tmp_path, named, field, monkeypatch
):
    config = run_over(named, tmp_path / "run")
    read = run_inputs(config, open_corpus(config.data))
    claim_workdir(config, read)
    assert read_inputs(config.workdir) == read and read.keys() == named.keys()
    before = contents(tmp_path / "run")
    named[field].write_text(named[field].read_text().replace("e", "i"))
    now = run_inputs(config, open_corpus(config.data))
    starts = [run]
    if field == "data.files":  # several runs in one program have no probes
        starts.append(lambda c: train_parallel_runs([c, c], c.workdir, StopAt(0)))
        starts.append(lambda c: _part(EvaluateConfig(c.workdir), resolve(c.workdir)))
        words = ["x", "--checkpoint", config.workdir, "--bytes_per_patch", "4"]
        monkeypatch.setattr("sys.argv", words)
        monkeypatch.setattr(entropy_threshold, "enable_compilation_cache", lambda: None)
        starts.append(lambda c: entropy_threshold.main())
    for start in starts:
        with pytest.raises(ConfigError, match=f"^{field}: the content has fingerprint ") as e:
            start(config)
        assert f"{now[field]}, but the run" in str(e.value) and f"{read[field]}: " in str(e.value)
        assert "\n" not in str(e.value) and contents(tmp_path / "run") == before


def test_another_spelling_of_the_same_text_is_the_same_run(tmp_path, named, monkeypatch):
    config = run_over(named, tmp_path / "run")
    claim_workdir(config, run_inputs(config, open_corpus(config.data)))
    monkeypatch.chdir(tmp_path)
    data = replace(config.data, files=("run/../?.txt",), num_workers=2, prefetch_batches=9)
    other = replace(config, data=data, eval=replace(config.eval, probe_files=()))
    with locked_workdir(other, run_inputs(other, open_corpus(data))):
        said = claim_workdir(other, run_inputs(other, open_corpus(data)), done=3)
    assert [line.split("=")[0] for line in said] == [
        "data.files.0", "data.num_workers", "data.prefetch_batches", "eval.probe_files"
    ]  # fmt: skip
    assert read_config(tmp_path / "run") == other
    (tmp_path / "run" / "inputs.json").unlink()  # a run of an earlier version
    with pytest.raises(ConfigError, match="data.files.0=.*use that value to resume it"):
        changes(config, run_inputs(config, open_corpus(config.data)))
    claim_workdir(other, run_inputs(other, open_corpus(data)))
    assert read_inputs(tmp_path / "run").keys() == {"data.files"}
    (tmp_path / "a.txt").write_text("others " * 200)
    read = run_inputs(config, open_corpus(config.data))
    with pytest.raises(ConfigError, match=f"data.files.0=.*fingerprint {read['data.files']}, the"):
        changes(config, read)


def test_hosts_compare_what_they_read(tmp_path, named, monkeypatch):
    config, told = run_over(named, tmp_path / "run"), {}

    def compare(values):
        told.update(values)
        raise ConfigError("hosts differ")

    monkeypatch.setattr(distributed, "assert_same_on_all_hosts", compare)
    with pytest.raises(ConfigError, match="hosts differ"):
        run(config)
    assert told.items() >= run_inputs(config, open_corpus(config.data)).items()
    assert not (tmp_path / "run").exists()


REFUSED = {
    "accumulate": dict(train=TrainConfig(steps=4, accumulate=3)),
    "mesh": dict(mesh=MeshConfig(data=3)),
    "rows": dict(data=replace(tiny_run(Path()).data, batch_size=5), mesh=MeshConfig(data=8)),
    "probe_files": dict(eval=replace(tiny_run(Path()).eval, probe_files=("/nowhere/*.jsonl",))),
    "files": dict(data=replace(tiny_run(Path()).data, files=("/nowhere/*.txt",))),
    "share": dict(data=replace(tiny_run(Path()).data, files=("synthetic:latin", "synthetic:greek"),
                               weights=(1.0, 1e-9))),
    "multipliers": dict(optim=replace(tiny_run(Path()).optim, lr_multipliers=(1.0,))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_start_that_is_refused_leaves_nothing(tmp_path, name):
    config = replace(tiny_run(tmp_path / "a" / "run"), **REFUSED[name])
    with pytest.raises(ConfigError) as e:
        run(config)
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard/events.1", "checkpoints/3/state"])
def test_files_that_no_run_wrote_are_not_changed(tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 5, "mine": 1}\n')
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"has {name.split('/')[0]}, but no config.json of a run"):
        run(tiny_run(tmp_path / "run"))
    assert contents(tmp_path) == before


def test_a_profile_that_would_kill_the_process_is_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("hnet.train.trace._loads_libtpu_in_vain", lambda: True)
    with pytest.raises(ConfigError, match="JAX_PLATFORMS"):
        run(tiny_run(tmp_path / "run", profile=ProfileConfig("2:4")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("accumulate", "data.batch_size=8 is not a multiple of"),
        ("probe_files", "No such file"),
    ],
)
def test_several_runs_in_one_program_are_checked_as_one_is(tmp_path, name, says):
    config = replace(tiny_run(tmp_path / "run"), **REFUSED[name])
    both = [config, replace(config, seed=1)]
    with pytest.raises(ConfigError, match=says) as separate:
        run(config)
    with pytest.raises(ConfigError) as together:
        train_parallel_runs(both, config.workdir, StopAt(0))
    assert name != "accumulate" or str(separate.value)[:15] == str(together.value)[:15]
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_back_to_a_checkpoint_of_before_the_fault(tmp_path, monkeypatch, said):
    """Every step is saved, also those in the bad range, and skipped updates change nothing."""
    config = tiny_run(
        tmp_path,
        train=TrainConfig(steps=6, log_every=1, max_skipped=3),
        checkpoint=CheckpointConfig(every=1, keep=9),
    )
    real, fed = loop.put_batch, []

    def poison(batch, mesh):
        fed.append(real(batch, mesh))
        if len(fed) in (3, 4, 5):
            fed[-1]["input_ids"] = fed[-1]["input_ids"] * 0 + 10**6  # no such byte
        return fed[-1]

    monkeypatch.setattr(loop, "put_batch", poison)
    outcome = run(config)
    assert int(outcome.state.step) == 6 and int(outcome.state.skipped) == 0
    assert any(
        "a row up to 5, first in stage0/aux_loss: rolled back to step 2" in line for line in said
    )
    folders = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert {"3.aside-1", "4.aside-1"} <= folders and {"1", "2", "3", "4", "5", "6"} <= folders
    assert [row["step"] for row in rows(config)] == [1, 2, 3, 4, 5, 6]


def test_a_disk_without_room_for_settings_is_one_line(tmp_path, monkeypatch):
    def full(path, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(work_folder(tmp_path)), "replace", full)
    with pytest.raises(Failed, match="cannot be written to .No space left on device") as e:
        claim_workdir(tiny_run(tmp_path))
    assert "\n" not in str(e.value) and list(tmp_path.iterdir()) == []


def test_what_host_0_does_for_all_is_told_to_all(monkeypatch):
    """Host 1 of two receives the answer of host 0."""
    answers = {
        "refused": '{"refused": "no"}',
        "failed": '{"failed": "oh"}',
        "value": '{"value": 3}',
    }
    monkeypatch.setattr(distributed, "num_hosts", lambda: 2)
    monkeypatch.setattr(distributed, "host_id", lambda: 1)
    monkeypatch.setattr(distributed, "exchange", lambda name, value: [answers[name[6:]], value])
    assert distributed.on_first_host("value", pytest.fail) == 3
    with pytest.raises(ConfigError, match="^no$"):
        distributed.on_first_host("refused", pytest.fail)
    with pytest.raises(Failed, match="^oh$"):
        distributed.on_first_host("failed", pytest.fail)
