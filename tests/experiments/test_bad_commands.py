"""Bad command lines for all commands: exit code 2, one line, no work done, nothing written."""

import argparse
import importlib
import json
import typing

import pytest

from hnet import command_help, command_line
from hnet.bounds import NamesFile
from hnet.command_line import with_words
from hnet.errors import ConfigError
from hnet.fields import marks, options, plain, to_json, unwrap
from hnet.train.config import Config
from hnet.train.named import base_config

OPTIONS = {
    "experiments.benchmarks.__main__": "Benchmark",
    "experiments.benchmarks.decode": "Command",
    "experiments.benchmarks.input": "InputBenchmark",
    "experiments.benchmarks.routing": "RoutingBenchmark",
    "experiments.benchmarks.sweep": "SweepBenchmark",
    "experiments.boundaries": "BoundariesConfig",
    "experiments.calibrate": "CalibrateConfig",
    "experiments.compare.settings": "Compare",
    "hnet.commands.evaluate": "EvaluateConfig",
    "experiments.entropy_threshold": "ThresholdConfig",
    "experiments.fairness": "FairnessConfig",
    "experiments.scripts.__main__": "FairnessTableConfig",
    "hnet.commands.generate": "GenerateConfig",
    "hnet.commands.segment": "SegmentConfig",
    "hnet.data.__main__": "Prepare",
    "experiments.retokenize": "Retokenize",
    "experiments.tokenizer": "Tokenizer",
}
"""Commands configured by their own dataclass."""
GIVEN = {
    "checkpoint": "x", "files": ["x"], "gold": ["x"], "kind": "x", "out": "x", "train": ["x"],
}  # fmt: skip
"""Values of the fields that must be given."""
MAY_BE_NEGATIVE = ("mesh.data", "mesh.fsdp", "mesh.tensor", "window_size")

WRONG = {
    int: ["x", "1.5", "nan", "1e400", "2e63", str(2**63), "-" + "9" * 400, "-2", ""],
    float: ["x", "nan", "inf", "-inf", "1e400", "1e300", "-1e300", ""],
    bool: ["yes", "1", ""],
    NamesFile: ["", "a\0b", "x" * 4000],
}
ABSURD = {int: str(2**31 - 1), float: "1e11"}
MAY_BE_ABSURD = (
    "seed", "max_bytes", "max_texts", "max_lines", "heldout", "shard_bytes", "steps", "batches",
    "compare.settings:bytes", "reference_parameters", "routing:run", "temperature",
    "repetition_penalty", "repetition_window", "top_k",
)  # fmt: skip
"""Seeds, upper limits of what a text or a plan has, and numbers that any work allows."""


def cases():
    for module, name in OPTIONS.items():
        cls = getattr(importlib.import_module(module), name)
        content = GIVEN_OF(cls) | command_help.defaults(cls)
        yield from ((module, cls, content, path, hint) for path, hint in numbers(cls, content))
    content = to_json(base_config("default"))
    yield from (("run", Config, content, path, hint) for path, hint in numbers(Config, content))


def GIVEN_OF(cls):
    hints = typing.get_type_hints(cls)
    return {n: 6.0 if hints[n] is float else v for n, v in GIVEN.items() if n in hints}


def numbers(cls, content):
    """(path, type) of the fields that take numbers or truth values."""
    from hnet.dotted import locate

    for path in command_help.leaves(cls, content):
        hint = locate(cls, content, path)[2]
        if any(isinstance(mark, NamesFile) for mark in marks(hint)):
            yield path, NamesFile
        hint = plain(hint)
        kinds = [unwrap(option) for option in options(hint)] or [hint]
        for kind in kinds:
            if typing.get_origin(kind) is tuple:
                kind = unwrap(typing.get_args(kind)[0])
            if kind in WRONG:
                yield path, kind


CASES = list(cases())


@pytest.mark.parametrize(
    ("cls", "content", "path", "kind"),
    [case[1:] for case in CASES],
    ids=[f"{case[0]}:{case[3]}" for case in CASES],
)
def test_every_field_of_every_command_refuses_what_it_is_not(cls, content, path, kind):
    content = json.dumps(content)
    for word in WRONG[kind]:
        if word == "-2" and path.endswith(MAY_BE_NEGATIVE):
            continue
        with pytest.raises(ConfigError) as error:
            with_words(cls, json.loads(content), [f"--{path}", word])
            pytest.fail(f"--{path} {word} was taken")
        message = str(error.value)
        assert path.split(".")[-1] in message and "\n" not in message and len(message) < 400


LARGE = [
    case
    for case in CASES
    if case[0] != "run"
    and case[4] in ABSURD
    and not f"{case[0].removeprefix('experiments.')}:{case[3]}".endswith(MAY_BE_ABSURD)
    and case[3].partition(".")[0] not in typing.get_type_hints(Config)  # a run's: see its own
]


@pytest.mark.parametrize(
    ("cls", "content", "path", "kind"),
    [case[1:] for case in LARGE],
    ids=[f"{case[0]}:{case[3]}" for case in LARGE],
)
def test_numbers_that_no_work_allows_are_refused(cls, content, path, kind):
    with pytest.raises(ConfigError, match=path.split(".")[-1]):
        with_words(cls, json.loads(json.dumps(content)), [f"--{path}", ABSURD[kind]])
        pytest.fail(f"--{path} {ABSURD[kind]} was taken")


# --- every option that names a file is known as one -----------------------------------------------

OTHER_TEXT = {
    "config", "compare", "base", "name", "kind", "prompt", "dtype", "alphabet", "reference",
    "groups", "suite", "systems", "text", "stop",
    "files", "train", "unseen", "bpe_files", "parallel",
    "project", "zone", "accelerator", "runtime_version", "bucket", "cluster", "service_account",
    "image", "home", "time", "partition", "account", "command", "topology", "address", "study",
    "only", "signal_host", "create_arg", "ssh_arg",
}  # fmt: skip
"""Names, words, globs, LANGUAGE=FILE, addresses, and places on other machines."""

PARSERS = (
    "experiments.benchmarks.kernels", "experiments.claims.__main__",
    "experiments.finetune.__main__", "experiments.scaling.__main__", "experiments.slots.__main__",
    "experiments.sweep", "hnet.checkpoint.__main__", "hnet.interop.__main__", "tpu.emulate",
    "tpu.launch", "tpu.plan", "tpu.published",
)  # fmt: skip


def test_fields_of_text_are_paths_or_known_as_something_else():
    for module, name in OPTIONS.items():
        cls = getattr(importlib.import_module(module), name)
        own = typing.get_type_hints(cls, include_extras=True)
        for field, hint in own.items():
            if "str" in str(hint) and field not in (*Config.__dataclass_fields__, *OTHER_TEXT):
                is_path = any(isinstance(mark, NamesFile) for mark in marks(hint))
                of_language = (name, field) == ("FairnessConfig", "gold")  # LANGUAGE=FILE
                assert is_path or of_language or "Literal" in str(hint), (name, field)


@pytest.mark.parametrize("module", PARSERS)
def test_options_of_text_are_paths_or_known_as_something_else(module, monkeypatch):
    class Found(Exception):
        pass

    def parse_known_args(parser, *_):
        raise Found(parser)

    monkeypatch.setattr(command_line.OneLineParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr("sys.argv", ["command", "verify"])
    main = importlib.import_module(module).main
    with pytest.raises(Found) as found:
        main()
    open_, options = [found.value.args[0]], []
    while open_:
        for action in open_.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                open_ += action.choices.values()
            elif action.nargs != 0 and not action.choices:
                options.append(action)
    assert options
    for action in options:
        assert action.type or action.dest in OTHER_TEXT, action.dest
        assert action.type is not str
