"""`experiments.generate` as users start it: a prompt, a pipe, a file of prompts, and errors."""

import base64
import fcntl
import io
import json
import os
import threading
import tracemalloc
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from hnet import command_line
from hnet.commands import generate as command
from hnet.commands import prompt_file
from hnet.decode import cache_memory
from hnet.decode.decoder import Decoder
from hnet.decode.generate import Generation, chunk_starts, generate, stream_text
from hnet.decode.sampling import Sampling
from hnet.errors import ConfigError
from tests.networks import network, random_params, stage

pytestmark = pytest.mark.usefixtures("quick_compilation")

SAMPLING = Sampling(max_bytes=12, temperature=0.8)
FLAGS = ["--sampling.max_bytes", "12", "--sampling.temperature", "0.8"]
LINES = [
    {"prompt": "Привет", "seed": 2**32 - 1},
    {"prompt": "a", "id": 7},
    {"prompt": "", "seed": 0},
]


@pytest.fixture(scope="module")
def model():
    return nnx.merge(*random_params(network(stage("t1 t1", 26), stage("t1", 26))))


@pytest.fixture
def run(model, monkeypatch, capsys):
    """(exit code, stdout, stderr) of the command with these options and this on its stdin."""
    monkeypatch.setattr(command, "load", lambda path, dtype, ema: model)
    monkeypatch.setattr(command, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(command_line, "keep_freed_memory", lambda: None)

    def run(*options, stdin=""):
        monkeypatch.setattr("sys.argv", ["generate", "--checkpoint", "x", *FLAGS, *options])
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(SystemExit) as e:
            command_line.run(command.main)
        return e.value.code, *capsys.readouterr()

    return run


def continued(model, prompt, seed=0):
    """The text as the command generates it: in the same blocks, so that little is compiled."""
    sampling = replace(SAMPLING, seed=seed)
    return "".join(piece.text for piece in stream_text(model, [prompt], sampling, block_len=8))


def refused(answer, *says):
    code, out, err = answer
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert all(text in err for text in says), err


def test_a_prompt_is_printed_with_its_continuation(run, model):
    expected = continued(model, "Once")
    assert run("--prompt", "Once") == (0, f"Once{expected}\n", "")
    code, out, _ = run("--prompt", "Once", "--boundaries", "True")
    assert code == 0 and out.replace("|", "").count("Once") == 1  # marks may lie between


def test_every_line_of_a_pipe_is_continued(run, model):
    texts = [continued(model, prompt, seed) for seed, prompt in enumerate(["ab", "c é"])]
    both = f"ab{texts[0]}\nc é{texts[1]}\n"
    assert run(stdin="ab\nc é\n") == (0, both, "")
    assert run(stdin="ab\nc é") == (0, both, "")  # truncated, without a newline
    assert run(stdin="\ufeffab\r\nc é") == (0, both, "")  # a byte order mark is no text
    assert run(stdin="\nab\n  \n\r\nc é\r\n\n") == (0, both, "")  # blank lines do not count
    refused(run(stdin=""), "nothing to continue")
    refused(run(stdin="\n\n"), "nothing to continue")
    code, out, _ = run(stdin=b"\xff\n")  # bytes that are not text are continued too
    assert code == 0 and out.startswith("\ufffd")


def test_a_file_of_prompts_becomes_a_file_of_texts(run, model, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    files = ("--input", str(prompts), "--output", str(out), "--sampling.seed", "5")
    assert run(*files, "--batch_size", "2")[0] == 0
    seeds = [2**32 - 1, 5 + 1, 0]  # default: the first seed plus the line number
    prompted = [line["prompt"] for line in LINES]
    expected = generate(model, prompted, SAMPLING, seeds=seeds, batch_size=2)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    for line, got, result in zip(LINES, found, expected, strict=True):
        assert got.items() >= line.items() and got["finish_reason"] == result.finish_reason
        data = got["text"].encode() if "text" in got else base64.b64decode(got["base64"])
        assert data == result.data
        assert ("text" in got) == (data.decode("utf-8", "replace").encode() == data)
        np.testing.assert_allclose(got["logprobs"], result.logprobs, rtol=0, atol=2e-5)
        assert got["starts"] == chunk_starts(model.config, result.boundaries)

    whole = out.read_bytes()
    refused(run(*files), f"output='{out}' exists", "resume")
    assert out.read_bytes() == whole
    first, second, _ = whole.splitlines(keepends=True)
    out.write_bytes(first + second[:20])  # killed while it wrote
    other = (*files, "--resume", "True", "--sampling.temperature", "0.5")
    refused(run(*other), "was made by another model or with other settings", "fingerprint")
    assert out.read_bytes() == first + second[:20]
    assert run(*files, "--batch_size", "2", "--resume", "True")[0] == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("text", line.get("base64")) for line in again] == [
        line.get("text", line.get("base64")) for line in found
    ]
    assert out.read_bytes().startswith(first)


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "a", "seed": 4294967296}', '{"prompt": "a", "seed": -1}', '{"prompt": 3}',
     '{"prompt": "a", "seed": "x"}', '{"prompt": "a", "seed": null}', '{"seed": 1}', '"a"', "{",
     '{"prompt": "a", "seed": Infinity}', '{"prompt": "a", "b": ' + 9000 * "[" + 9000 * "]" + "}"],
)  # fmt: skip
def test_lines_that_are_no_prompts_are_named(run, tmp_path, line):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "fine"}\n' + line + "\n")
    refused(run("--input", str(prompts), "--output", str(out)), f"input='{prompts}'", "line 2")
    assert not out.exists()


RESULT = {"prompt": "a", "text": "b", "finish_reason": "eos", "logprobs": [], "starts": [[0]]}


@pytest.mark.parametrize(
    "content",
    [
        b"one\ntwo\nthree without an end",
        json.dumps({"prompt": "other"}).encode() + b"\n",
        json.dumps(RESULT).encode() + b'\n{"prompt": "of another file',
        json.dumps(RESULT | {"prompt": "c"}).encode() + b"\n",
        json.dumps(RESULT).encode() + b"\n" + 9 * (json.dumps(RESULT).encode() + b"\n"),
        json.dumps({"prompt": "a", "text": "mine"}).encode(),
        b"\x00" * 100,
    ],
)
def test_a_file_that_is_not_of_these_prompts_is_not_changed(run, tmp_path, content):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "mine"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    out.write_bytes(content)
    options = ("--input", str(prompts), "--output", str(out), "--resume", "True")
    refused(run(*options), "output=", "no results of these prompts")
    assert out.read_bytes() == content


def test_results_in_a_prompt_are_not_repeated_and_recognise_no_file(run, model, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "mine"
    prompts.write_text('{"text": "former", "prompt": "a", "id": 7}\n')
    for content in ('{"my": "not', '{"text": "of mine'):
        out.write_text(content)
        options = ("--input", str(prompts), "--output", str(out), "--resume", "True")
        refused(run(*options), "no results of these prompts")
        assert out.read_text() == content
    raw = Generation(b"a", b"\xff", np.zeros(1), np.zeros((2, 1), bool), "length")
    line = command._line(model, json.loads(prompts.read_text()), raw)
    assert "text" not in line and (line["base64"], line["id"]) == ("/w==", 7)


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_input_is_not_taken_for_the_output(run, tmp_path, end):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}' + end)
    before = prompts.read_bytes()
    (tmp_path / "link").symlink_to(prompts)
    for output in (prompts, tmp_path / "link"):
        options = ("--input", str(prompts), "--output", str(output), "--resume", "True")
        refused(run(*options), "no results of these prompts")
    assert prompts.read_bytes() == before


def test_outputs_that_cannot_be_are_named_before_any_work(run, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    monkeypatch.setattr(command, "load", None)
    long = str(tmp_path / ("x" * 300))
    for output in (tmp_path, "/dev/null", prompts / "a", long, "gs://a/b", "a\0b"):
        answer = run("--input", str(prompts), "--output", str(output))
        refused(answer, "output=")
        assert len(answer[2]) < 600
    for source in (tmp_path, "/dev/zero", long, "http://a/b", "a\0b", ""):
        refused(run("--input", str(source), "--output", str(tmp_path / "out")), "input")
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_prompts_are_lines_of_the_file_and_of_nothing_else(run, model, tmp_path):
    """Characters that Python treats as line ends are text in JSON."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    text = "a\u2028b\x85c"
    prompts.write_text(f'\ufeff{{"prompt": "{text}", "x": NaN}}\r\n\n', encoding="utf-8")
    assert run("--input", str(prompts), "--output", str(out))[0] == 0
    found = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert found["prompt"] == text and found["x"] is None


def test_an_output_has_one_writer(run, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    begun = json.dumps(RESULT) + '\n{"prompt": "b", "te'
    out.write_text(begun)
    options = ("--input", str(prompts), "--output", str(out), "--resume", "True")
    with out.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused(run(*options), f"output='{out}' is being written by another process")
        assert out.read_text() == begun
    (tmp_path / "folder").mkdir()
    refused(run(*options[:3], str(tmp_path / "folder"), *options[4:]), "is no file")


def test_files_that_are_missing_or_without_a_partner_are_named(run, tmp_path):
    out = tmp_path / "texts.jsonl"
    missing = tmp_path / "missing.jsonl"
    refused(run("--input", str(missing)), "input and output belong together")
    refused(run("--input", str(missing), "--output", str(out)), f"input='{missing}'", "not exist")
    missing.write_bytes(b"\xff\n")
    refused(run("--input", str(missing), "--output", str(out)), "UTF-8")
    assert not out.exists()


# --- how much is asked for ----------------------------------------------------------------------


def test_a_length_that_no_memory_holds_is_refused(run):
    refused(
        run("--prompt", "a", "--sampling.max_bytes", "1000000000"),
        "sampling.max_bytes=1000000000", "GB", "or less",
    )  # fmt: skip


def test_what_is_refused_and_what_the_remedy_says(model, monkeypatch):
    monkeypatch.setattr(cache_memory, "free_memory", lambda: 3_000_000)
    decoder = Decoder(model)
    with pytest.raises(ConfigError, match="use [0-9]+ or less, or fewer rows together") as e:
        decoder.start([b"abc", b"d"], Sampling(max_bytes=10**6))
    most = int(str(e.value).split("use ")[1].split()[0])
    assert most > 1000
    state, _ = decoder.start([b"abc", b"d"], Sampling(max_bytes=most))
    assert 1_500_000 < sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache)) <= 3_000_000
    with pytest.raises(ConfigError, match=f"max_bytes={most + 1}:"):
        decoder.start([b"abc", b"d"], Sampling(max_bytes=most + 1))
    monkeypatch.setattr(cache_memory, "free_memory", lambda: 10)
    with pytest.raises(ConfigError, match="use a shorter prompt"):
        decoder.start([b"abc"], Sampling(max_bytes=1))
    monkeypatch.setattr(cache_memory, "free_memory", lambda: None)  # unknown: try
    decoder.start([b"abc", b"d"], Sampling(max_bytes=most))


def test_a_cache_that_does_not_grow_streams_as_long_as_it_is_told():
    """States and windows take the same memory for any length."""
    model = nnx.merge(*random_params(network(stage("m1 m1", 26), stage("t1", 26, window=4))))
    pieces = stream_text(model, ["ab"], Sampling(max_bytes=1 << 30, eos=False), block_len=4)
    texts = [next(pieces) for _ in range(6)]
    assert all(piece.finished is None for piece in texts) and "".join(p.text for p in texts)


# --- prompts that are many ------------------------------------------------------------------------


def lines_of(number, bad=""):
    yield from (b'{"prompt": "%s"}\n' % (b"x" * 100) for _ in range(number))
    yield bad.encode()


@pytest.mark.parametrize("is_pipe", [False, True])
def test_prompts_are_read_while_they_are_needed(tmp_path, monkeypatch, is_pipe):
    """Memory for a file of prompts does not grow with their number."""
    source, number = tmp_path / "prompts.jsonl", 20_000
    if is_pipe:
        os.mkfifo(source)
        monkeypatch.setattr(prompt_file, "READ_AHEAD", 10_000)

    def fill():
        with source.open("wb") as file:
            file.writelines(lines_of(number))

    write = threading.Thread(target=fill)
    write.start()
    if not is_pipe:
        write.join()
    tracemalloc.start()
    with prompt_file.opened_prompts(str(source)) as (prompts, total):
        assert total == (None if is_pipe else number)
        assert sum(prompt["prompt"] == "x" * 100 for prompt in prompts) == number
    assert tracemalloc.get_traced_memory()[1] < 1_000_000  # a list of them needs 9 MB
    tracemalloc.stop()
    write.join()


def test_a_bad_line_is_found_before_any_work_unless_a_pipe_is_long(tmp_path, monkeypatch):
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b"".join(lines_of(300, bad="{")))
    with pytest.raises(ConfigError, match="line 301 is no object"):
        with prompt_file.opened_prompts(str(source)):
            pytest.fail("it was taken")
    monkeypatch.setattr(prompt_file, "MOST_LINE", 100)
    with pytest.raises(ConfigError, match="line 1 is longer than"):
        with prompt_file.opened_prompts(str(source)):
            pytest.fail("it was taken")


def test_only_a_batch_of_prompts_is_taken_at_a_time(model):
    taken = []

    def prompts():
        for i in range(9):
            taken.append(i)
            yield "ab"

    finished = 0
    for piece in stream_text(model, prompts(), SAMPLING, batch_size=2):
        finished += piece.finished is not None
        assert len(taken) <= 2 * (finished // 2) + 2
    assert finished == 9
