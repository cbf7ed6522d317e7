"""Named configurations: their content and lookup; a broken file affects only itself."""

import json
import re
import sys
from pathlib import Path

import pytest

from experiments import configs
from experiments.configs.__main__ import table
from hnet.config import HNetConfig
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.flops import param_counts
from hnet.model import abstract
from hnet.train import named
from hnet.train.named import base_config, help_text, list_text, named_configs, run_config
from tests.resolved import resolved

NAMES = sorted(named_configs())
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", NAMES)
def test_every_named_configuration_builds_and_says_how_to_run_it(name):
    config = base_config(name)
    assert abstract(config.model)[1]
    assert config.workdir == f"runs/{name}"
    module = sys.modules[f"experiments.configs.{named_configs()[name].file.stem}"]
    command = f"experiments.pretrain{'' if name == 'default' else ' '}"
    assert command in module.__doc__
    line = list_text().partition(f"\n  {name} ")[2].splitlines()[0].strip()
    assert named_configs()[name].summary.startswith(line) and len(line) > 20


def test_what_cannot_be_trained_says_so_in_one_line():
    with pytest.raises(ConfigError, match=r"losses: labels='given', but data.labels=''.*: use "):
        run_config(["dtp_unigram", "--data.labels", ""])


def test_systems_are_those_of_the_table():
    """SYSTEMS.md is up to date, every published system has its facts, and its tests exist."""
    assert (named.folder() / "SYSTEMS.md").read_text(encoding="utf-8") == table()
    for name, own in named_configs().items():
        assert tuple(own.facts) in ((), named.FACTS), name
        for place in re.findall(r"tests/[\w/]+\.py", own.facts.get("Test", "")):
            assert (named.folder().parents[1] / place).exists(), (name, place)


def test_resolved_values_are_those_on_record():
    """A changed default or helper shows here in every configuration that it changes."""
    recorded = json.loads((GOLDEN / "configurations.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(resolved())) == recorded


def test_names_are_those_of_the_issue():
    published = {"1stage_L", "1stage_XL", "2stage_L", "2stage_XL"}
    systems = {"hnet", "hnet_space", "hnet_pool", "spacebyte", "magnet", "flexitokens"}
    systems |= {f"dtp_{kind}" for kind in ("gumbel", "entropy", "unigram", "whitespace", "fixed")}
    systems |= {"au_net_2", "au_net_3", "megabyte_2", "megabyte_3", "hat_whitespace", "hat_words"}
    systems |= {"tfree_hat", "learn_your_tokens", "byte2word"}
    assert published | systems | {"default", "tiny", "reference"} <= set(NAMES)


def test_published_names_are_the_published_networks():
    for name in ("1stage_L", "2stage_XL_code"):
        assert base_config(name).model.to_json() == HNetConfig.named(name).to_json()


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("dna", 64), ("magnet_126M", 123), ("flexitokens_126M", 116), ("english_small", 1.2),
        ("chinese_small", 1.4), ("code_small", 1.2), ("dna_small", 0.7), ("audio_small", 3.2),
    ],
)  # fmt: skip
def test_recipes_have_the_size_that_they_name(name, millions):
    """The published ones: 64M parameters on DNA, 126M with a larger vocabulary and its MLPs."""
    found = sum(param_counts(base_config(name).model).values()) / 1e6
    assert found == pytest.approx(millions, rel=0.05)


def test_recipes_of_raw_bytes_have_no_special_bytes():
    for name in ("dna", "dna_small", "audio_small", "image_rows_small"):
        assert not base_config(name).data.bos_eos, name


BROKEN = {
    "syntax.py": ("def config() -> Config:\n    return (\n", "syntax", "syntax.py: line 2: "),
    "binary.py": ("\x00", "binary", "binary.py: "),
    "misspelt.py": (
        '"""Misspelt."""\nfrom hnet.train.config import Config, TrainConfig\n\n\n'
        "def config() -> Config:\n    return TrainConfig(stops=1)\n",
        "misspelt",
        "misspelt.py, line 6: TypeError: .*stops",
    ),
    "imports.py": (
        '"""Imports."""\nimport no_such_module\n\n\ndef config() -> "Config": ...\n\n\n'
        "def config_x() -> Config: ...\n",
        "x",
        "imports.py, line 2: ModuleNotFoundError",
    ),
    "refused.py": (
        "from hnet.train.config import Config, TrainConfig\n\n\n"
        "def config() -> Config:\n    return TrainConfig(steps=0)\n",
        "refused",
        "refused.py: train.steps=0: use 1 or more",
    ),
    "empty.py": ("Config = 3\n\ndef config() -> Config:\n    pass\n", "empty", "None is no Config"),
    "again.py": ("def tiny() -> Config: ...\n", "tiny", "tiny.py: .*'tiny', which .*again.py"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of named configurations, including the valid ones."""
    for file in named.folder().glob("[a-z]*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.setattr(configs, "__path__", [str(tmp_path)])
    for name in [n for n in sys.modules if n.startswith("experiments.configs.")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.mark.parametrize(("file", "case"), BROKEN.items())
def test_a_broken_file_breaks_only_itself_in_one_line(folder, file, case):
    text, name, says = case
    (folder / file).write_text(text)
    with pytest.raises(ConfigError, match=says) as error:
        base_config(name)
    assert "\n" not in str(error.value)
    assert base_config("default").workdir == "runs/default"
    assert name in list_text() and "A small 1-stage" in list_text()


def test_a_file_without_a_docstring_is_a_configuration(folder):
    (folder / "plain.py").write_text(
        "from experiments.configs import tiny\nfrom hnet.train.config import Config\n\n\n"
        "def config() -> Config:\n    return tiny.config()\n"
    )
    assert base_config("plain").workdir == "runs/plain"
    assert "plain  " in list_text() and "(no docstring)" in list_text()


# --- files and functions ------------------------------------------------------------------------


def run_file(tmp_path, content, *words):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content))
    return run_config([str(file), *words])


def test_a_file_may_hold_only_what_differs(tmp_path):
    base = base_config("tiny")
    changes = {
        "base": "tiny",
        "train": {"steps": 7},
        "optim.b2": 0.5,
        "model": {"stages": {"0": {"d_model": 16, "rotary_emb_dim": 4}}},
    }
    config = run_file(tmp_path, changes, "--train.log_every", "3")
    assert (config.train.steps, config.train.log_every, config.optim.b2) == (7, 3, 0.5)
    assert config.model.stages[0].d_model == 16 and config.workdir == "runs/mine"
    expected = to_json(base)
    expected["train"] |= {"steps": 7, "log_every": 3}
    expected["optim"]["b2"], expected["workdir"] = 0.5, "runs/mine"
    expected["model"]["stages"][0] |= {"d_model": 16, "rotary_emb_dim": 4}
    assert to_json(config) == expected
    assert run_file(tmp_path, {"base": "tiny", "workdir": "there"}).workdir == "there"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"base": "tiny", "train": {"stops": 7}}, "unknown field train.stops: did you mean"),
        ({"base": "tinny"}, "configuration 'tinny' is unknown: did you mean tiny?"),
        ({"base": 3}, "base=3 is no name of a configuration"),
        ({"base": "mine.json"}, "base='mine.json' is no name"),
        ({"base": "tiny", "train": 7}, "train=7: expected an object"),
        ({"base": "tiny", "train": {"steps": 2.5}}, "train.steps=2.5: expected int"),
        ({"arch_layout": ["m2"], "dropout": 1}, "dropout"),
        ({}, "model is missing"),
        ([], r"configuration=\[\]: expected an object"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, says):
    with pytest.raises(ConfigError, match=says) as error:
        run_file(tmp_path, content)
    assert "\n" not in str(error.value)


def test_a_network_of_the_official_format_is_trained_as_the_default(tmp_path):
    network = HNetConfig.named("1stage_L")
    config = run_file(tmp_path, network.to_json())
    assert config.model == network and config.workdir == "runs/mine"
    assert config.optim == base_config("default").optim


def paper():
    return HNetConfig.named("1stage_L")


def test_a_function_of_any_module_is_a_configuration():
    assert run_config([f"{__name__}:paper"]).model == paper()
    for place, says in (
        (f"{__name__}:nothing", "has no function 'nothing'"),
        ("no.such:thing", "No module named"),
        (f"{__name__}:NAMES", "has no function 'NAMES'"),
    ):
        with pytest.raises(ConfigError, match=says):
            run_config([place])


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("controller.gain", "rate_control.gain"),
        ("controller.settle_bytes", "rate_control.offset_bytes"),
        ("train.packed_rows", "train.rows_sharing_slots"),
    ],
)
def test_the_name_of_an_earlier_version_is_told(before, now):
    with pytest.raises(ConfigError, match=f"field {before} is called {now} now"):
        run_config(["tiny", f"--{before}", "1"])


def test_words_override_the_named_configuration():
    config = run_config(["reference", "--optim.b2", "0.99", "--data.files", "a*.txt", "b.txt"])
    assert config.optim.b2 == 0.99 and config.optim.schedule == "cosine"
    assert config.data.files == ("a*.txt", "b.txt")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--optim.learning_rat", "1"], "optim.learning_rat: did you mean optim.learning_rate?"),
        (["--learning_rate", "1"], "learning_rate: did you mean optim.learning_rate?"),
        (["nosuch"], "configuration 'nosuch' is unknown: use one of .*tiny"),
        (["magnets"], "'magnets' is unknown: did you mean magnet?"),
        (["--seed", "x"], "seed='x': expected int"),
        (["--model.stages.0.arch_layout", "q3", "m4"], "stages.0.arch_layout.*'q3'"),
        (["--model.stages.1.num_heads", "7"], "stages.1.d_model=256 is not divided by num_heads=7"),
        (["--train.steps", "0"], "train.steps=0"),
        (["missing.json"], "missing.json.*No such file"),
        (["--help", "trian"], "unknown field trian: did you mean train?"),
    ],
)
def test_bad_settings_are_one_line(argv, says):
    with pytest.raises(ConfigError, match=says) as error:
        run_config(argv)
    assert "\n" not in str(error.value)


def test_help_fits_two_screens_and_goes_deeper(capsys):
    content = to_json(base_config("default"))
    first = help_text(content)
    assert len(first.splitlines()) <= 45 and max(map(len, first.splitlines())) <= 100
    assert set(NAMES) <= set(re.findall(r"\w+", first))
    for section in ("model", "data", "train"):
        assert f"\n  {section} " in first
    with pytest.raises(SystemExit):
        run_config(["tiny", "--help", "model.stages.0.chunking"])
    assert "--model.stages.0.chunking.target_ratio" in capsys.readouterr().out
