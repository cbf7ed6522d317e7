"""A start that is refused: exit code 2, one line on stderr, no file left, changed or made."""

import importlib
import io
import json
import signal
import sys

import pytest

from hnet.checkpoint.step_folders import checkpoint_folder
from hnet.command_line import exit_code
from hnet.fields import to_json
from hnet.train import command
from hnet.train.workdir import claim_workdir
from tests.training import tiny_run

LONG = "x" * 5000
DEEP = "[" * 100_000

# Words that every setting which names a file or folder is given.
NO_FILES = ("missing", "folder", "/dev/zero", "gs://nowhere/x", LONG, "a\0b", "")
NO_JSON = ("deep.json", "bytes.json", "list.json", "text.txt", "empty")

RUN = ("experiments.pretrain", "tiny.json")
AT = ("--checkpoint", "run")
SWEEP = ("experiments.sweep", "tiny.json", "--out", "sweep", "--space")
PLAN = ("experiments.scaling.__main__", "plan", "--out", "ladder", "--levels", "64")
PREPARE = ("hnet.data.__main__", "prepare")
DESCRIBE = ("hnet.data.__main__", "describe", "--files")
LAUNCH = ("tpu.launch", "slurm", "run", "a", "--state", "state")

STARTS = [
    *((*RUN, "--workdir", word) for word in ("text.txt", "/dev/null", LONG, "a\0b")),
    *((*RUN, "--data.files", word) for word in ("missing", "folder", "/dev/zero", LONG, "a\0b")),
    *((*RUN, "--data.tokenizer", word) for word in (*NO_FILES[:-1], *NO_JSON[:4], "no.json")),
    *((*RUN, "--data.tokenizer", word) for word in ("empty_tokens.json", "huge_id.json")),
    *((*RUN, "--eval.probe_files", word) for word in (*NO_FILES, *NO_JSON[:4])),
    *(("experiments.pretrain", word) for word in (*NO_FILES, *NO_JSON, "nobody:home")),
    (*RUN, "--eval.max_bytes", "-1"),
    (*RUN, "--train.steps", "2e63"),
    (*RUN, "--seed", "-1"),
    (*RUN, "--optim.b1", "2"),
    (*RUN, "--optim.weight_decay", "-1"),
    (*RUN, "--model.stages.0.arch_layout", "T99999999", "m1"),
    (*RUN, "--model.stages.1.d_model", "1000000"),
    (*RUN, "--model.stages.1.d_intermediate", "2000000000"),
    (*RUN, "--model.vocab_size", "2000000000"),
    (*RUN, "--data.batch_size", "2000000000"),
    (*RUN, "--train.accumulate", "3"),
    (*RUN, "--mesh.data", "3"),
    (*RUN, "--no.such", "1"),
    (*RUN, "--watchdog.timeout_seconds", "inf"),
    (*RUN, "--profile.steps", "9:1"),
    *(
        (name, "--checkpoint", word, *more)
        for name, more in (
            ("hnet.commands.evaluate", ()),
            ("hnet.commands.generate", ("--prompt", "a")),
            ("hnet.commands.segment", ("--text", "a")),
            ("experiments.boundaries", ("--gold", "gold.jsonl")),
            ("experiments.fairness", ("--files", "a=text.txt", "b=text.txt", "--out", "new")),
        )
        for word in ("missing", "folder", "run", "text.txt", LONG, "a\0b", "broken")
    ),
    *(
        ("hnet.commands.generate", *AT, "--input", w, "--output", "new")
        for w in (*NO_FILES, *NO_JSON)
    ),
    ("hnet.commands.generate", *AT, "--input", "prompts.jsonl", "--output", "text.txt"),
    ("hnet.commands.generate", *AT, "--input", "prompts.jsonl", "--output", "folder"),
    ("hnet.commands.generate", *AT, "--prompt", "a", "--sampling.max_bytes", "-1"),
    *(("hnet.commands.segment", *AT, "--file", word) for word in NO_FILES[:-1]),
    ("hnet.commands.segment", *AT, "--text", "a", "--html", "text.txt"),
    *(("experiments.boundaries", *AT, "--gold", word) for word in (*NO_FILES, *NO_JSON)),
    ("experiments.boundaries", *AT, "--gold", "gold.jsonl", "--lexicon", "missing"),
    *(("hnet.commands.evaluate", *AT, "--files", word) for word in NO_FILES),
    ("hnet.commands.evaluate", *AT, "--suite", "nosuch"),
    ("hnet.commands.evaluate", *AT, "--suite", "fairness", "--parallel", "a=missing", "b=folder"),
    *(
        ("experiments.fairness", "--files", "a=text.txt", "b=text.txt", "--out", "new", *more)
        for more in (
            ("--tokenizer", "empty_tokens.json"),
            ("--tokenizer", "deep.json"),
            ("--tokenizer", "folder"),
            ("--gold", "a=missing"),
            ("--bpe", "-1"),
        )
    ),
    ("experiments.fairness", "--files", "a=missing", "b=text.txt", "--out", "new"),
    ("experiments.fairness", "--files", "a=text.txt", "b=text.txt", "--out", "text.txt"),
    *((*SWEEP, word) for word in (*NO_FILES, *NO_JSON, "many.toml", "trials.toml", "deep.toml")),
    (*SWEEP, "space.toml", "--width", "0"),
    (*SWEEP, "space.toml", "--out", "text.txt"),
    (*SWEEP, "space.toml", "--out", "/dev/null"),
    (*SWEEP, "space.toml", "--storage", "text.txt"),
    (*SWEEP, "space.toml", "--data.files", "missing"),
    (*PLAN, "tiny.json", "--bytes-per-parameter", "nan"),
    (*PLAN, "tiny.json", "--tokenizer", "empty_tokens.json"),
    (*PLAN, "tiny.json", "--levels", "2000000000"),
    *((*PLAN[:2], "--out", word, "tiny.json") for word in ("text.txt", LONG, "a\0b", "")),
    *(("experiments.scaling.__main__", w, "--out", "plans") for w in ("run", "fit")),
    ("experiments.scaling.__main__", "run", "--out", "missing"),
    *(("experiments.calibrate", "--mean-ratio", "6", "--files", w) for w in ("a=missing", "x", "")),
    ("experiments.calibrate", "--mean-ratio", "6", "--files", "a=text.txt", "--out", "text.txt"),
    ("experiments.calibrate", "--mean-ratio", "6", "--files", "a=text.txt", "--base", "deep.json"),
    *(("hnet.interop.__main__", "verify", word, "run") for word in (*NO_FILES, *NO_JSON)),
    *(("hnet.interop.__main__", "convert", word, "new.npz") for word in (*NO_FILES, *NO_JSON)),
    *((*DESCRIBE, word) for word in NO_FILES),
    *((*PREPARE, "--files", "text.txt", "--out", word) for word in ("text.txt", "shards")),
    *((*PREPARE, "--files", "text.txt", "--out", word) for word in ("/dev/null", LONG, "a\0b")),
    *((*PREPARE, "--out", "new", "--files", word) for word in NO_FILES),
    *(("hnet.checkpoint.__main__", "verify", word) for word in NO_FILES),
    *(("tpu.plan", "tiny.json", "--topology", word) for word in ("x", "v5e:0x4", "h100:-1", "")),
    ("tpu.plan", "missing", "--topology", "h100:8"),
    ("tpu.launch", "nowhere", "run", "a"),
    (*LAUNCH, "--nodes", "0", "--", "python", "-m", "x"),
    (*LAUNCH[:-1], "text.txt", "--", "python", "-m", "x"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    (root / "folder").mkdir()
    (root / "text.txt").write_text("some text of a few words\n" * 99)
    (root / "empty").touch()
    (root / "deep.json").write_text(DEEP)
    (root / "deep.toml").write_text(f"[space]\nseed = {DEEP}")
    (root / "bytes.json").write_bytes(b"\xff\xfe\x00{")
    (root / "list.json").write_text("[1]")
    (root / "no.json").write_text("{}")
    (root / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (root / "gold.jsonl").write_text('{"id": "1", "text": "a b", "spans": [[0, 1], [2, 3]]}\n')
    bpe = {"type": "BPE", "vocab": {}, "merges": []}
    (root / "empty_tokens.json").write_text(json.dumps({"version": "1.0", "model": bpe}))
    bpe["vocab"] = {"a": 2**32 - 2}
    (root / "huge_id.json").write_text(json.dumps({"version": "1.0", "model": bpe}))
    (root / "space.toml").write_text("[space]\noptim.learning_rate = [1e-3, 2e-3]\n")
    ranges = "\n".join(
        f"optim.{name} = {{ low = 0.1, high = 0.5, num = 2000 }}" for name in ("b1", "b2")
    )
    (root / "many.toml").write_text(f"[space]\n{ranges}\n")
    (root / "trials.toml").write_text(f'sampler = "random"\ntrials = 2000000000\n[space]\n{ranges}')
    config = tiny_run(root / "run")
    claim_workdir(config)  # a run without a checkpoint
    claim_workdir(tiny_run(root / "broken"))
    step = checkpoint_folder(root / "broken") / "4"
    (step / "state").mkdir(parents=True)
    (step / "manifest.json").write_text(DEEP)
    (root / "tiny.json").write_text(json.dumps(to_json(tiny_run("made"))))
    (root / "plans").mkdir()
    (root / "plans" / "plan.json").write_text(DEEP)
    (root / "shards").mkdir()
    (root / "shards" / "manifest.json").write_text(DEEP)
    return root


def contents(root):
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def stop(*_):
    raise TimeoutError("it does not end")


def _name(start):
    return " ".join(repr(word)[1:-1] if len(word) < 100 else "LONG" for word in start)


@pytest.mark.parametrize("start", STARTS, ids=map(_name, STARTS))
def test_a_refused_start_is_one_line_and_changes_nothing(tree, start, monkeypatch, capfd):
    module = importlib.import_module(start[0])
    for each in (module, command):
        monkeypatch.setattr(each, "enable_compilation_cache", lambda: None, raising=False)
    monkeypatch.setattr(command, "one_device_a_core", lambda rows: None)
    monkeypatch.setattr(sys, "argv", ["command", *start[1:]])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    monkeypatch.chdir(tree)
    before = contents(tree)
    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        code, _ = exit_code(module.main)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    told = capfd.readouterr().err
    assert (code, told.count("\n")) == (2, 1), told[-3000:]
    assert told.startswith("error: ") and len(told) < 1000
    assert contents(tree) == before
