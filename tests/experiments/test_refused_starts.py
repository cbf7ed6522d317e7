"""A start that is refused: exit code 2, one line on stderr, no file left, changed or made."""

import importlib
import inspect
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from hnet import files
from hnet.checkpoint.manifest import FORMAT, json_hash
from hnet.checkpoint.step_folders import checkpoint_folder
from hnet.command_line import exit_code
from hnet.fields import to_json
from hnet.train import command
from hnet.train.workdir import claim_workdir
from tests import training
from tests.training import TINY

LONG = "x" * 5000
DEEP = "[" * 100_000

# Words that every setting which names a file or folder is given.
NO_FILES = ("missing", "folder", "fifo", "/dev/zero", "gs://nowhere/x", LONG, "a\0b", "")
FEW = ("missing", "folder", "a\0b")
NO_JSON = ("deep.json", "bytes.json", "list.json", "text.txt", "empty")

# Content of files that commands store and read again, valid JSON of another shape.
OTHER_CONTENT = {"a_list": "[1]", "an_object": '{"settings": 1}', "a_deep": DEEP}

# What is no checkpoint, in the forms that every command takes.
OTHER_RUNS = (
    "", "run@9", "run/checkpoints/9", "run@x", "missing@1", "http://x/y", "fifo", "piped", "other"
)  # fmt: skip

RUN = ("experiments.pretrain", "tiny.json")
tiny_run = partial(training.tiny_run, model=TINY)
AT = ("--checkpoint", "run")
TOKENS = ("--data.tokenizer", "bpe:260", "--model.vocab_size", "260")
GENERATE = ("hnet.commands.generate", *AT, "--input", "prompts.jsonl")
SWEEP = ("experiments.sweep", "tiny.json", "--out", "sweep", "--space")
POINTS = {  # a sweep of two points, of which the second cannot start
    "second_tokenizer": 'data.tokenizer = ["bytes", "missing"]',
    "second_text": 'data.files = [["text.txt"], ["missing"]]',
    "second_probe": 'eval.probe_files = [[], ["missing"]]',
    "second_tracker": 'tracker.name = ["", "nosuch:Class"]',
    "second_start": 'init.from = ["", "missing"]',
}
PLAN = ("experiments.scaling.__main__", "plan", "tiny.json", "--out", "ladder", "--levels", "64")
PREPARE = ("hnet.data.__main__", "prepare")
DESCRIBE = ("hnet.data.__main__", "describe", "--files")
LAUNCH = ("tpu.launch", "slurm", "run", "a", "--state", "state")
AFTER = ("--", "python", "-m", "x")
PLACE = ("--project", "p", "--zone", "us-west4-a")
VM = ("tpu.launch", "tpu-vm", "create", "a", "--state", "state", *PLACE)
GKE = ("tpu.launch", "gke", "run", "a", "--state", "state", *PLACE, "--cluster", "c")
COMPARE = ("experiments.compare.__main__", "hnet", "--workdir", "compare", "--data.files")
HELD = ("text.txt", "--data.eval_files", "text.txt")
TUNE = ("experiments.finetune.__main__", "--init.from", "missing", "--text")
HNET = "hnet.commands.__main__"
PUSH = ("hnet.interop.__main__", "push")
PULL = ("hnet.interop.__main__", "pull")

# Commands that write into a local folder, without the folder.
INTO = [
    (*SWEEP, "space.toml", "--out"),
    (*PLAN[:2], "tiny.json", "--levels", "64", "--out"),
    ("experiments.scaling.__main__", "run", "--out"),
    (*PREPARE, "--files", "text.txt", "--out"),
    ("experiments.fairness", "--files", "a=text.txt", "b=text.txt", "--out"),
    ("experiments.slots.__main__", "--data.files", "text.txt", "--workdir"),
    (*COMPARE, *HELD, "--workdir"),
    ("hnet.interop.__main__", "convert", "run"),
    (*PULL, "hf://a/b"),
    ("tpu.published", "--topology", "h100:1", "--model", "1stage_L", "--out"),
    ("experiments.scripts.__main__", "--train", "a=text.txt", "b=text.txt", "--out"),
    ("experiments.claims.__main__", "--data.files", *HELD, "--workdir"),
    ("experiments.rates.__main__", "--data.files", *HELD, "--workdir"),
    (*TUNE[:1], "tiny.json", "--init.from", "run", "--text", "a=text.txt:text.txt", "--workdir"),
    ("experiments.benchmarks.__main__", "--json"),
    ("experiments.benchmarks.kernels", "--out"),
    ("experiments.calibrate", "--mean-ratio", "6", "--files", "a=text.txt", "--out"),
    ("experiments.tokenizer", "--kind", "bpe:300", "--files", "text.txt", "--out"),
    ("hnet.commands.segment", *AT, "--text", "a", "--html"),
    (*GENERATE, "--output"),
    (*SWEEP, "space.toml", "--storage"),
    (*LAUNCH[:-1],),
]
BUCKET_TOO = [(*RUN, "--workdir"), ("experiments.rate_control.__main__", "tiny.json", "--workdir")]

STARTS = [
    *(("tpu.emulate", "--log-dir", word, "--", "x") for word in ("gs://x/y", "text.txt/x", "")),
    *(
        (*start, word)
        for start in INTO
        for word in ("gs://x/y", "text.txt/x", "broken_link", "", "/proc/x", LONG, "x" * 300)
        if (start[-1], word) != ("--storage", "gs://x/y")
    ),
    *((*start, word) for start in BUCKET_TOO for word in ("", "text.txt/x", "/proc/x", LONG)),
    *((*LAUNCH[:-1], word, "--go", *AFTER) for word in ("gs://x/y", "text.txt/x", "broken_link")),
    *((*RUN, "--workdir", word) for word in ("text.txt", "/dev/null", LONG, "a\0b")),
    *((*RUN, "--data.files", word) for word in ("missing", "folder", "/dev/zero", LONG, "a\0b")),
    *((*RUN, "--data.tokenizer", word) for word in (*NO_FILES[:-1], *NO_JSON[:4], "no.json")),
    *((*RUN, "--data.tokenizer", word) for word in ("empty_tokens.json", "huge_id.json")),
    *((*RUN, "--eval.probe_files", word) for word in (*NO_FILES, *NO_JSON[:4])),
    *(("experiments.pretrain", word) for word in (*NO_FILES, *NO_JSON, "missing:name")),
    ("experiments.benchmarks.__main__", "--measure", "step", "--compare", "nosuch"),
    ("experiments.benchmarks.decode", "--wait_share", "-1"),
    ("experiments.benchmarks.decode", "--main_width", "65536", "--main_layers", "1000"),
    ("experiments.benchmarks.logging", "tiny.json", "--train.steps", "0"),
    ("experiments.benchmarks.rounding", "--rates", "0"),
    ("experiments.benchmarks.routing", "--repeats", "2147483647"),
    ("experiments.benchmarks.sweep", "--rates", "1000", "--seeds", "1000"),
    ("experiments.configs.__main__", "nosuch"),
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
    (*RUN, "--workdir", "foreign"),
    (*RUN, *TOKENS, "--workdir", "learned", "--train.accumulate", "3"),
    (*RUN, *TOKENS, "--workdir", "learned", "--eval.probe_files", "missing"),
    (*RUN, *TOKENS, "--workdir", "foreign"),
    (*RUN, "--mesh.data", "3"),
    (*RUN, "--no.such", "1"),
    (*RUN, "--watchdog.timeout_seconds", "inf"),
    (*RUN, "--profile.steps", "9:1"),
    (*RUN, "--optim.learning_rate", "1e300"),
    (*RUN, "--watchdog.timeout_seconds", "1e300"),
    (*RUN, "--workdir", "http://x/y"),
    *(
        (name, "--checkpoint", word, *more)
        for name, more in (
            ("hnet.commands.evaluate", ()),
            ("hnet.commands.generate", ("--prompt", "a")),
            ("hnet.commands.segment", ("--text", "a")),
            ("experiments.boundaries", ("--gold", "gold.jsonl")),
            ("experiments.fairness", ("--files", "a=text.txt", "b=text.txt", "--out", "new")),
        )
        for word in ("missing", "folder", "run", "text.txt", LONG, "a\0b", "broken", *OTHER_RUNS)
    ),
    *(("experiments.retokenize", "--checkpoint", word) for word in OTHER_RUNS),
    *(("experiments.benchmarks.input", "--checkpoint", word) for word in OTHER_RUNS),
    *(
        ("experiments.entropy_threshold", "--bytes_per_patch", "4", "--checkpoint", word)
        for word in OTHER_RUNS
    ),
    *((*RUN, "--init.from", word) for word in ("run@9", "missing@1", "http://x/y", "other")),
    *(
        ("hnet.commands.generate", *AT, "--input", w, "--output", "new")
        for w in (*NO_FILES, *NO_JSON)
    ),
    *((*GENERATE, "--output", word) for word in ("text.txt", "folder")),
    ("hnet.commands.generate", *AT, "--prompt", "a", "--sampling.max_bytes", "-1"),
    *(("hnet.commands.segment", *AT, "--file", w) for w in NO_FILES[:-1]),
    (*GENERATE, "--output", "folder", "--resume", "True"),
    (*GENERATE, "--output", "/dev/zero", "--resume", "True"),
    ("hnet.commands.segment", *AT, "--text", "a", "--html", "text.txt"),
    *(("experiments.boundaries", *AT, "--gold", word) for word in (*NO_FILES, *NO_JSON)),
    ("experiments.boundaries", *AT, "--gold", "gold.jsonl", "--lexicon", "missing"),
    ("experiments.boundaries", *AT, "--gold", "gold.jsonl", "--lexicon", "blank"),
    *(("hnet.commands.evaluate", *AT, "--files", word) for word in NO_FILES),
    ("hnet.commands.evaluate", *AT, "--suite", "nosuch"),
    ("hnet.commands.evaluate", *AT, "--batch_size", "2000000000"),
    ("hnet.commands.generate", *AT, "--batch_size", "2000000000", "--prompt", "a"),
    ("hnet.commands.evaluate", *AT, "--suite", "fairness", "--parallel", "a=missing", "b=folder"),
    *(
        ("experiments.fairness", "--files", "a=text.txt", "b=text.txt", "--out", "new", *more)
        for more in (
            ("--tokenizer", "empty_tokens.json"),
            ("--tokenizer", "deep.json"),
            ("--tokenizer", "folder"),
            ("--gold", "a=missing"),
            ("--gold", "a=empty"),
            ("--gold", "a=endless.jsonl"),
            ("--gold", "a=half.jsonl"),
            ("--bpe", "300", "--bpe_files", "a=empty"),
            ("--bpe", "-1"),
            ("--bpe", "2147483647", "--bpe_files", "a=text.txt"),
            ("--bpe", "255", "--bpe_files", "a=text.txt"),
        )
    ),
    ("experiments.fairness", "--files", "a=missing", "b=text.txt", "--out", "new"),
    ("experiments.tokenizer", "--kind", "nosuch:300", "--files", "text.txt", "--out", "new"),
    ("experiments.tokenizer", "--kind", "bpe:300", "--files", "missing", "--out", "new"),
    ("experiments.fairness", "--files", "a=text.txt", "b=text.txt", "--out", "text.txt"),
    *((*SWEEP, word) for word in (*NO_FILES, *NO_JSON, "many.toml", "trials.toml", "deep.toml")),
    (*SWEEP, "space.toml", "--width", "0"),
    *((*SWEEP, "space.toml", "--heartbeat-timeout", word) for word in ("inf", "nan", "0", "1e300")),
    (*SWEEP, "space.toml", "--eval.probe_files", "missing"),
    (*SWEEP, "space.toml", "--tracker.name", "nosuch:Class"),
    *((*SWEEP, f"{name}.toml") for name in POINTS),
    (*SWEEP, "space.toml", "--out", "text.txt"),
    (*SWEEP, "space.toml", "--out", "/dev/null"),
    (*SWEEP, "space.toml", "--storage", "text.txt"),
    (*SWEEP, "space.toml", "--data.files", "missing"),
    *((*PLAN, "--bytes-per-parameter", word) for word in ("nan", "inf", "1e300", "0")),
    *((*PLAN, "--bpe", word) for word in ("-1", "0", "999999999")),
    (*PLAN, "--tokenizer", "empty_tokens.json"),
    (*PLAN, "--levels", "2000000000"),
    *((*PLAN[:2], "--out", word, "tiny.json") for word in ("text.txt", LONG, "a\0b", "")),
    *(("experiments.scaling.__main__", w, "--out", "plans") for w in ("run", "fit")),
    ("experiments.scaling.__main__", "run", "--out", "missing"),
    *(("experiments.calibrate", "--mean-ratio", "6", "--files", w) for w in ("a=missing", "x", "")),
    ("experiments.calibrate", "--mean-ratio", "6", "--files", "a=text.txt", "--out", "text.txt"),
    ("experiments.calibrate", "--mean-ratio", "6", "--files", "a=text.txt", "--base", "deep.json"),
    *(("hnet.interop.__main__", "verify", word, "run") for word in (*NO_FILES, *NO_JSON)),
    ("hnet.interop.__main__", "verify", "run", "run", "--config", "missing"),
    (*RUN, "--data.num_workers", "2147483647"),
    (*RUN, "--data.prefetch_batches", "2147483647"),
    *(("hnet.interop.__main__", "convert", word, "new.npz") for word in (*NO_FILES, *NO_JSON)),
    *((*DESCRIBE, word) for word in NO_FILES),
    *((*PREPARE, "--files", "text.txt", "--out", word) for word in ("text.txt", "shards")),
    *((*PREPARE, "--files", "text.txt", "--out", word) for word in ("/dev/null", LONG, "a\0b")),
    *(
        (*PREPARE, "--out", "new", "--files", word)
        for word in (*NO_FILES, "binary", "empty", "torn.jsonl")
    ),
    *(
        ("experiments.calibrate", "--mean-ratio", "6", "--files", f"a={w}")
        for w in ("empty", "blank")
    ),
    (*RUN, "--model.stages.0.chunking.target_ratio", "1e18"),
    (*RUN, "--model.stages.0.chunking.routes", "2147483647"),
    *(("hnet.checkpoint.__main__", "verify", word) for word in NO_FILES),
    *(("tpu.plan", "tiny.json", "--topology", word) for word in ("x", "v5e:0x4", "h100:-1", "")),
    ("tpu.plan", "missing", "--topology", "h100:8"),
    ("tpu.launch", "nowhere", "run", "a"),
    (*LAUNCH, "--nodes", "0", "--", "python", "-m", "x"),
    (*LAUNCH[:-1], "text.txt", "--", "python", "-m", "x"),
    *((*LAUNCH[:-1], word, "--go", *AFTER) for word in (LONG, "a\0b", "/dev/null", "settings")),
    *((*LAUNCH, "--go", "--home", word, *AFTER) for word in ("a b", "a\0b", "a\nb", "")),
    *((*LAUNCH, "--go", f"--{name}", "nan", *AFTER) for name in ("stagger", "max-restarts")),
    *((*LAUNCH, "--go", "--nodes", word, *AFTER) for word in ("-1", "9" * 30, "1.5")),
    *((*LAUNCH, "--go", f"--{name}", "a b", *AFTER) for name in ("time", "partition", "account")),
    *((*LAUNCH, "--go", "--", word) for word in ("\udc80", "a\0b", "")),
    (*LAUNCH, "--go"),
    *((*VM, "--go", "--poll", word) for word in ("nan", "inf", "-1", "0")),
    *((*VM, "--go", "--accelerator", word) for word in ("v5e", "v9-16", "v5litepod-0", LONG, "")),
    *((*VM, "--go", f"--{name}", "a b") for name in ("runtime-version", "bucket", "zone")),
    *((*VM[:3], word, *VM[4:], "--go") for word in ("", "A", "../a", "a\0b", LONG)),
    (*VM[:6], "--go"),
    *((*GKE, "--go", "--image", word, *AFTER) for word in ("a b", "a\nb", "")),
    (*GKE, "--go", *AFTER),
    *((*GKE, "--image", "i", "--go", f"--{n}", "x y", *AFTER) for n in ("via", "service-account")),
    (*GKE, "--image", "i", "--go", "--accelerator", "v5litepod-5", *AFTER),
    (*GKE, "--image", "i", "--go", "--via", "xpk", "--", "a\nb"),
    *((*COMPARE, word, *HELD[1:]) for word in FEW),
    *((*COMPARE, "text.txt", "--data.eval_files", word) for word in FEW),
    *((*COMPARE, *HELD, "--gold", word) for word in (*FEW, "deep.json")),
    *((*COMPARE, *HELD, "--workdir", w) for w in ("text.txt", "/dev/null", LONG, "a\0b", "gs://x")),
    *(
        (*COMPARE[:1], word, *COMPARE[2:], *HELD)
        for word in ("missing", "deep.json", "missing:name")
    ),
    *((*COMPARE, *HELD, "--reference", word) for word in (*FEW, "deep.json")),
    *((*COMPARE, *HELD, "--seeds", word) for word in ("0", "-1", "1000000", "nan")),
    *((*COMPARE, *HELD, "--bytes", word) for word in ("-1", "2e63", "1e400")),
    (*COMPARE, *HELD, "--reference_parameters", "9" * 18),
    (*COMPARE, *HELD, "--reference_parameters", "1"),
    (*COMPARE, *HELD, "--data.batch_size", "2000000000"),
    (*COMPARE, *HELD, "--train.accumulate", "3"),
    (*COMPARE, *HELD, "--match", "x"),
    (COMPARE[0], "hnet", *COMPARE[1:], *HELD),
    *((COMPARE[0], *COMPARE[4:], *HELD, "--workdir", word) for word in ("plans", "damaged")),
    *((*COMPARE, *HELD, "--workdir", name) for name in OTHER_CONTENT),
    *(("experiments.claims.__main__", "--report", "--workdir", name) for name in OTHER_CONTENT),
    *(
        ("experiments.slots.__main__", "--data.files", "text.txt", "--workdir", name)
        for name in OTHER_CONTENT
    ),
    *((*TUNE, word) for word in ("x", "", "a=", "a=b", "a=b:", "a=text.txt:text.txt", LONG)),
    (*TUNE[:2], "", "--text", "a=text.txt:text.txt"),
    (*TUNE, "a=text.txt:text.txt", "--seeds", "-1"),
    (*TUNE, "a=text.txt:text.txt", "--rows", "x"),
    *((*TUNE[:2], w, "--text", "a=text.txt:text.txt") for w in (*FEW, "deep.json")),
    *((HNET, word) for word in ("nosuch", "-x", "\x1b[2J", LONG)),
    *((HNET, name, "missing", "new.npz") for name in ("convert", "verify")),
    *((HNET, name) for name in ("convert", "verify", "checkpoint", "segment", "evaluate")),
    (HNET, "checkpoint", "verify", "missing"),
    (HNET, "checkpoint", "nosuch", "run"),
    (HNET, "segment", "--checkpoint", "missing", "--text", "a"),
    (HNET, "generate", "--checkpoint", "folder", "--prompt", "a"),
    (HNET, "evaluate", "--checkpoint", "text.txt"),
    *((*PUSH, word, "hf://a/b") for word in (*NO_FILES, "bytes.json", "run", "broken")),
    *(
        (*PUSH, "run", word)
        for word in ("missing", "hf://", "hf://a", "hf://a/b/c", "", "hf://a/b@")
    ),
    *((*PULL, word, "new") for word in ("missing", "hf://", "hf://a", "hf://a/b c", "")),
    *((*PULL, "hf://a/b", word) for word in ("text.txt", "folder", LONG, "a\0b", "", "/dev/null")),
]


def test_every_command_reports_its_errors_when_started_as_a_module():
    for name in {start[0] for start in STARTS} - {"tpu.launch"}:  # it prints them itself
        module = importlib.import_module(name)
        last = inspect.getsource(module).partition('if __name__ == "__main__":')[2].strip()
        assert not last or last in ("run(main)", "run(main, trains=True)", "main()"), name


NO_STARTS = {
    "experiments.evaluate", "experiments.generate", "experiments.segment",  # hnet.commands
    "hnet.data.script_table",  # takes no words
    "hnet.interop.lm_eval",  # reads words by the library that it calls
    "tpu.aot",  # a part of tpu.plan in a process of its own
}  # fmt: skip


def test_every_command_is_started():
    root, names = Path(__file__).parents[2], set()
    for package in ("experiments", "hnet", "tpu"):
        for path in (root / package).rglob("*.py"):
            if 'if __name__ == "__main__":' in path.read_text():
                names.add(".".join(path.relative_to(root).with_suffix("").parts))
    assert names - {start[0] for start in STARTS} == NO_STARTS


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    (root / "folder").mkdir()
    (root / "text.txt").write_text("some text of a few words\n" * 99)
    (root / "empty").touch()
    (root / "blank").write_text(" \n\n")
    (root / "torn.jsonl").write_text('{"text": "some words"}\n' * 999 + '{"text"')
    for name, end in (("endless", "Infinity"), ("half", "1.5")):
        line = f'{{"id": "1", "text": "a b", "spans": [[0, {end}]]}}\n'
        (root / f"{name}.jsonl").write_text(line)
    (root / "binary").write_bytes(bytes(range(256)))
    os.mkfifo(root / "fifo")
    (root / "broken_link").symlink_to("nowhere")
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
    for name, field in POINTS.items():
        (root / f"{name}.toml").write_text(f"[space]\n{field}\n")
    ranges = "\n".join(
        f"optim.{name} = {{ low = 0.1, high = 0.5, num = 2000 }}" for name in ("b1", "b2")
    )
    (root / "many.toml").write_text(f"[space]\n{ranges}\n")
    (root / "trials.toml").write_text(f'sampler = "random"\ntrials = 2000000000\n[space]\n{ranges}')
    config = tiny_run(root / "run")
    claim_workdir(config)  # a run without a checkpoint
    claim_workdir(tiny_run(root / "broken"))
    (root / "piped").mkdir()
    os.mkfifo(root / "piped" / "config.json")
    claim_workdir(tiny_run(root / "other"))
    content = {"format": FORMAT, "more": 1}
    step = checkpoint_folder(root / "other") / "4"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(json.dumps(content | {"digest": json_hash(content)}))
    step = checkpoint_folder(root / "broken") / "4"
    (step / "state").mkdir(parents=True)
    (step / "manifest.json").write_text(DEEP)
    (root / "tiny.json").write_text(json.dumps(to_json(tiny_run("made"))))
    (root / "plans").mkdir()
    (root / "plans" / "plan.json").write_text(DEEP)
    (root / "damaged").mkdir()
    (root / "damaged" / "comparison.json").write_text(DEEP)
    for name, content in OTHER_CONTENT.items():
        (root / name / "hnet" / "seed0").mkdir(parents=True)
        (root / name / "rows").mkdir()
        (root / name / "comparison.json").write_text(content)
        (root / name / "hnet" / "seed0" / "row.json").write_text(content)
        (root / name / "rows" / "share0-seed0.json").write_text(content)
    (root / "settings" / "a").mkdir(parents=True)
    (root / "settings" / "a" / "settings.json").write_text(DEEP)
    (root / "foreign").mkdir()
    (root / "foreign" / "metrics.jsonl").write_text('{"step": 5, "mine": 1}\n')
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
    monkeypatch.setattr(command, "one_device_per_core", lambda rows: None)
    monkeypatch.setattr(sys, "argv", ["command", *start[1:]])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n")))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started something"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started something"))
    monkeypatch.setattr(files, "_PIPE_SECONDS", 0.01)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tree)
    before = contents(tree)
    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    try:
        code, _ = exit_code(getattr(module, "dispatch", module.main))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
    told = capfd.readouterr().err
    assert (code, told.count("\n")) == (2, 1), told[-3000:]
    assert told.startswith("error: ") and len(told) < 1000
    assert contents(tree) == before
