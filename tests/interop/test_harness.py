"""The adapter to lm-evaluation-harness, run by the harness itself on a local task."""

import json
import tomllib
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from hnet.command_line import exit_code
from hnet.decode.generate import generate
from hnet.decode.sampling import Sampling
from hnet.decode.score import logprobs
from hnet.interop import to_official
from hnet.interop.lm_eval import main as lm_eval_command
from tests.networks import network, official_network, random_params, stage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval", reason="the extra `harness` is missing")
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    from hnet.interop.harness import HarnessModel

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

QUESTIONS = [
    {"question": "two and two are", "choices": [" four", " five"], "answer": 0},
    {"question": "the sun is", "choices": [" cold", " hot"], "answer": 1},
    {"question": "né", "choices": [" à", " b"], "answer": 0},
]
CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def model():
    return nnx.merge(*random_params(network(stage("t1 t1", 26), stage("t1", 26))))


def request(kind, *args):
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


@pytest.fixture
def local_task(tmp_path, monkeypatch):
    """A folder with a task of the harness; no other place is searched."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    data = tmp_path / "questions.json"
    data.write_text("\n".join(json.dumps(q) for q in QUESTIONS))
    (tmp_path / "local_choice.yaml").write_text(CHOICE_TASK.replace("FILE", json.dumps(str(data))))
    return tmp_path


def test_the_command_of_the_harness_knows_our_models(local_task, monkeypatch, capsys):
    """`lm_eval --model hnet`, as in the README."""
    config, weights = to_official(nnx.merge(*random_params(official_network((32, "t1")))))
    np.savez(local_task / "model.npz", **weights)
    (local_task / "model.json").write_text(json.dumps(config))

    def run(*options):
        argv = ["--model", "hnet", "--tasks", "local_choice", "--include_path", str(local_task)]
        monkeypatch.setattr("sys.argv", ["lm_eval", *argv, *options])
        return exit_code(lm_eval_command)[0], *capsys.readouterr()

    path = local_task / "model.npz"
    code, out, _ = run("--model_args", f"checkpoint={path},max_bytes=9", "--batch_size", "auto")
    assert code == 0 and "local_choice" in out and "acc" in out
    code, out, err = run("--model_args", f"checkpoint={path}", "--batch_size", "0")
    assert code == 2 and err.endswith("error: batch_size='0': use a whole number from 1\n")
    code, out, err = run("--model_args", f"checkpoint={local_task / 'nothing'}")
    assert code == 2 and "nothing' does not exist" in err.splitlines()[-1]


def test_an_installed_harness_finds_the_name_by_itself():
    """The entry point that versions of the harness with plugins look for."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    value = project["project"]["entry-points"]["lm_eval.models"]["hnet"]
    assert EntryPoint("hnet", value, "lm_eval.models").load() is HarnessModel


def test_the_harness_scores_a_local_task(model, local_task):
    tmp_path = local_task
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(
        HarnessModel(model, batch_size=8), tasks=["local_choice"], task_manager=manager,
        bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    right = 0
    for q in QUESTIONS:
        scores = logprobs(model, [q["question"] + choice for choice in q["choices"]], batch_size=8)
        totals = [score.total(len(q["question"].encode())) for score in scores]
        right += int(np.argmax(totals)) == q["answer"]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


def test_requests_are_answered_in_their_order(model):
    harness = HarnessModel(model, batch_size=8)
    pairs = [("ab", "c"), ("", "xyz"), ("é", "é"), ("a", "")]
    found = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (total, is_greedy) in zip(pairs, found):
        (score,) = logprobs(model, [context + continuation], batch_size=1)
        start = len(context.encode())
        assert total == pytest.approx(score.total(start), abs=1e-4)
        assert is_greedy == bool(np.all(score.is_greedy[start:]))
    rolling = harness.loglikelihood_rolling([request("loglikelihood_rolling", "some text")])
    (score,) = logprobs(model, ["some text"], batch_size=1)
    assert rolling == [pytest.approx(score.total(), abs=1e-4)]


def test_generation_follows_each_request_s_settings(model):
    harness = HarnessModel(model, batch_size=2, max_bytes=6)
    plain, first = {"until": []}, generate(model, ["ab"], Sampling(max_bytes=6, temperature=0))[0]
    stop = next(c for c in first.text[1:] if c.isascii())  # the text is not all valid UTF-8
    found = harness.generate_until(
        [request("generate_until", "ab", {"until": [stop], "max_gen_toks": 6}),
         request("generate_until", "ab", plain),
         request("generate_until", "cd", plain)]
    )  # fmt: skip
    assert found[1] == first.text
    assert found[0] == first.text[: first.text.index(stop)]
    assert found[2] == generate(model, ["cd"], Sampling(max_bytes=6, temperature=0))[0].text
