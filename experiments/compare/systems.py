"""Systems of a comparison: named networks and token baselines, scaled to one cost."""

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from experiments.compare.match import (
    Rates,
    at_cost,
    expected_rates,
    flops_per_byte,
    parameters,
    seconds_per_byte,
)
from experiments.compare.settings import Compare
from hnet.command_help import value_text
from hnet.data import Corpus
from hnet.data.tokenizers import TOKENIZERS, Wanted
from hnet.data.tokens import read_vocabulary
from hnet.dotted import differences
from hnet.errors import ConfigError
from hnet.fields import to_json
from hnet.model import abstract
from hnet.train.config import Config, RateControlConfig, config_from_json
from hnet.train.named import base_config

TOKEN_NETWORK = "bytes_transformer"
SAMPLE_TEXTS, SAMPLE_BYTES = 32, 512  # training text on which rates of rules are counted
TOKENIZER_BYTES = 1 << 20  # training text from which vocabularies are learned


@dataclass(frozen=True)
class System:
    """One row of the table: a network at the common cost, and how it is trained."""

    name: str
    network: str
    """name of the configuration for `pretrain`: `name`, except for token baselines"""
    config: Config
    rates: Rates
    """boundary rates at which the cost was counted"""
    cost: float
    """cost of the network in the unit of the budget"""
    bytes_per_position: float = 1.0
    """source bytes per token; 1 for bytes"""
    source: str = ""
    """hash of a configuration that the user wrote; empty for named ones"""
    KEYS: ClassVar = {"name", "network", "config", "rates", "cost"}

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "config": to_json(self.config)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "System":
        """Read the JSON form. Raises ConfigError for other fields."""
        config, rates = config_from_json(content["config"]), tuple(content["rates"])
        try:
            return cls(**{**content, "config": config, "rates": rates})
        except TypeError as e:
            raise ConfigError(f"a system of the comparison has other fields: {e}") from None

    @property
    def folder_name(self) -> str:
        return folder_name(self.name)

    def run(self, folder: Path, seed: int) -> Config:
        """Configuration of the run with this seed."""
        workdir = str(folder / f"seed{seed}")
        return replace(self.config, seed=seed, workdir=workdir)

    def wanted(self, stage: int) -> float | None:
        """Positions per chunk that the stage is asked for; None for a rule that is not asked."""
        cut = self.config.model.stages[stage].chunking
        asked = cut.predictor.part.is_learned or cut.predictor.name == "fixed"
        return 1 / self.rates[stage] if asked else None


def folder_name(name: str) -> str:
    """Name of a system's folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).lstrip(".")


def command(config: Config, network: str) -> str:
    """The `pretrain` command of a configuration: all settings that differ from the named one."""
    words = ["python", "-m", "experiments.pretrain", network]
    for path, _, value in differences(to_json(base_config(network)), to_json(config)):
        words += [f"--{path}", *_words(value)]
    return shlex.join(words)


def _words(value: Any) -> list[str]:
    """A JSON value as words of the command line."""
    if isinstance(value, list):
        plain = value and all(isinstance(v, str | int | float) for v in value)
        return [str(v) for v in value] if plain else [json.dumps(value)]
    return [json.dumps(value)] if isinstance(value, dict) else [_word(value)]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else value_text(value)


def check_names(names: Sequence[str]) -> None:
    """Raise ConfigError for an unknown, repeated or impossible system."""
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"system {name!r} is named twice: name it once")
        if twins := [n for n in names if n != name and folder_name(n) == folder_name(name)]:
            raise ConfigError(f"systems {name!r} and {twins[0]!r} have one folder: rename a file")
        if name in TOKENIZERS:
            try:
                import tokenizers  # noqa: F401
            except ImportError:
                raise ConfigError(
                    f"system {name!r} needs the library tokenizers: pip install 'hnet-jax[bpe]'"
                ) from None
        else:
            abstract(base_config(name).model)


def source_of(name: str) -> str:
    """Hash of the configuration that a .json file or a function gives now; "" for other names."""
    if not (name.lower().endswith(".json") or ":" in name):
        return ""
    content = json.dumps(to_json(base_config(name)), sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def common(settings: Compare, name: str) -> Config:
    """The named system's network with the settings that all systems share.

    What belongs to the method is the system's own: its rate control and its labels.
    """
    named = base_config(name)
    shared = {section: getattr(settings, section) for section in SHARED}
    model = named.model
    if any(stage.chunking.loss_by_row for stage in model.stages[1:-1]):
        shared["train"] = replace(settings.train, rows_sharing_slots=1)
    if named.rate_control != RateControlConfig():
        shared["rate_control"] = named.rate_control
    if named.data.labels:
        shared["data"] = replace(settings.data, labels=named.data.labels)
    steps = settings.bytes // (settings.data.batch_size * settings.data.seq_len)
    if settings.bytes:
        shared["train"] = replace(shared["train"], steps=max(1, steps))
    compute = base_config("default").model.compute
    return replace(named, model=replace(model, compute=compute), **shared)


SHARED = (
    "data", "optim", "rate_control", "train", "eval", "checkpoint", "mesh", "distributed",
    "watchdog", "profile",
)  # fmt: skip


def texts_of(corpus: Corpus) -> list[bytes]:
    """Passages of the training text, spread evenly."""
    from hnet.suites.command import passages
    from hnet.suites.items import Settings

    return list(passages(corpus.train, Settings(SAMPLE_TEXTS, max_bytes=SAMPLE_BYTES)))


def learn_tokenizer(settings: Compare, name: str, corpus: Corpus) -> str:
    """tokenizer.json of a token baseline, from the beginning of the training text."""
    texts = corpus.train.beginning(TOKENIZER_BYTES)
    sample = [text.decode(errors="ignore").encode() for text in texts]
    return Wanted(name, settings.vocabulary).train(sample)


def token_config(settings: Compare, tokenizer: Path, corpus: Corpus) -> tuple[Config, float]:
    """(Transformer over tokens whose rows hold as many bytes as those of the others, bytes per
    token)."""
    vocabulary, texts = read_vocabulary(str(tokenizer)), texts_of(corpus)
    tokens = sum(len(vocabulary.encode(text)) for text in texts)
    size = sum(map(len, texts)) / tokens
    base = common(settings, TOKEN_NETWORK)
    length = max(2, round(base.data.seq_len / size))
    wanted = base.train.steps * base.data.seq_len
    steps = max(1, round(wanted / (length * size)))
    data = replace(base.data, seq_len=length, tokenizer=str(tokenizer))
    model = replace(base.model, vocab_size=vocabulary.size)
    train = replace(base.train, steps=steps)
    optim = replace(base.optim, lr_multipliers="none")  # the published ones are for bytes
    return replace(base, data=data, model=model, train=train, optim=optim), size


class Costs:
    """Cost of a network in the unit that a comparison matches."""

    def __init__(self, settings: Compare, corpus: Corpus):
        self.settings, self.corpus = settings, corpus

    def of(self, config: Config, rates: Rates, bytes_per_position: float) -> float:
        match self.settings.match:
            case "parameters":
                return float(parameters(config.model))
            case "flops":
                return flops_per_byte(config, rates, bytes_per_position)
            case "bytes_per_second":
                return seconds_per_byte(config, rates, self.corpus, bytes_per_position)
            case other:
                raise ConfigError(f"match={other!r}: use flops, parameters or bytes_per_second")

    def budget(self) -> float:
        """Cost of the reference system at the wanted number of parameters."""
        if self.settings.match == "parameters":
            return float(self.settings.parameters)
        config = common(self.settings, self.settings.reference)
        model, _ = at_cost(config.model, parameters, self.settings.parameters)
        rates = expected_rates(config.model, texts_of(self.corpus), bos=config.data.bos_eos)
        return self.of(replace(config, model=model), rates, 1.0)

    def system(self, name: str, budget: float, tokenizer: Path | None) -> System:
        """The named system at the budget. Raises ConfigError if it cannot be scaled to it."""
        size, network = 1.0, name
        if tokenizer:
            network = TOKEN_NETWORK
            config, size = token_config(self.settings, tokenizer, self.corpus)
            rates: Rates = ()
        else:
            config = common(self.settings, name)
            rates = expected_rates(config.model, texts_of(self.corpus), bos=config.data.bos_eos)

        def cost(model):
            return self.of(replace(config, model=model), rates, size)

        try:
            model, found = at_cost(config.model, cost, budget)
        except ConfigError as e:
            raise ConfigError(f"system {name!r}: {e}") from None
        return System(
            name, network, replace(config, model=model), rates, found, size, source_of(name)
        )
