"""The official JSON of a network (goombalab/hnet, configs/): read it, write it."""

import reprlib
from dataclasses import fields
from typing import Any

from hnet.architecture import Architecture
from hnet.errors import ConfigError
from hnet.layout import is_class, parse_layout
from hnet.nn.embeddings.bytes import Bytes
from hnet.nn.settings import AttentionConfig

_LETTERS = "mt"  # of layout strings
HEAD_DIM = 64
"""the official channels per head of Mamba-2, which its JSON does not have"""


def written(config: Architecture) -> dict[str, Any]:
    """The official JSON content of this architecture.

    Raises ConfigError if the official model does not support a stage or a mixer.
    """
    for i, stage in enumerate(config.stages[:-1]):
        for name, (own, official) in stage.chunking.unofficial_fields.items():
            raise ConfigError(
                f"model.stages.{i}.chunking.{name}={own!r} has no official form, which is "
                f"{official!r}: keep this model in its work directory"
            )
    if problem := unofficial_layers(config):
        raise ConfigError(f"{problem}: keep this model in its work directory")
    if config.ssm.head_dim != HEAD_DIM:
        raise ConfigError(
            f"model.ssm.head_dim={config.ssm.head_dim} has no official form, which is "
            f"{HEAD_DIM}: keep this model in its work directory"
        )
    return {
        "arch_layout": config.arch_layout,
        "d_model": [s.d_model for s in config.stages],
        "d_intermediate": [s.d_intermediate for s in config.stages],
        "vocab_size": config.vocab_size,
        "ssm_cfg": {
            "chunk_size": config.ssm.chunk_size,
            "d_conv": config.ssm.d_conv,
            "d_state": config.ssm.d_state,
            "expand": config.ssm.expand,
        },
        "attn_cfg": {
            "num_heads": [s.num_heads for s in config.stages],
            "rotary_emb_dim": [s.rotary_emb_dim for s in config.stages],
            "window_size": [s.window_size for s in config.stages],
        },
        "tie_embeddings": config.tie_embeddings,
    }


def unofficial_layers(config: Architecture) -> str | None:
    """One line on the first layer or option that the official H-Net does not have, or None."""
    if (own := config.embedding.name) != (official := Bytes.Config().name):
        return f"model.embedding={own!r} has no official form, which is {official!r}"
    for i, stage in enumerate(config.stages):
        for field in ("passes", "vectors"):
            if (value := getattr(stage, field)) > 1:
                return f"model.stages.{i}.{field}={value} has no official form, which is 1"
        if is_class(stage.arch_layout[0]):
            return (
                f"model.stages.{i}.arch_layout={stage.arch_layout!r} is a class, and the "
                "official H-Net has only layers"
            )
        kinds = {kind for part in stage.arch_layout for kind, _ in parse_layout(part)}
        if "" in stage.arch_layout:
            return f"model.stages.{i}.arch_layout={stage.arch_layout!r} has an empty stack"
        if other := sorted(kind for kind in kinds if kind.lower() not in _LETTERS):
            letters = ", ".join(_LETTERS)
            return (
                f"model.stages.{i}.arch_layout={stage.arch_layout!r} has layers {other[0]!r}, "
                f"and the official H-Net only {letters}"
            )
        plain = AttentionConfig()
        for field in fields(plain) if kinds & {"t", "T"} else ():
            if (value := getattr(stage.attention, field.name)) != getattr(plain, field.name):
                return f"model.stages.{i}.attention.{field.name}={value!r} has no official form"
    return None


_OFFICIAL_KEYS = {
    "arch_layout", "d_model", "d_intermediate", "vocab_size", "ssm_cfg", "attn_cfg",
    "tie_embeddings",
}  # fmt: skip
_OFFICIAL_SSM = {"chunk_size", "d_conv", "d_state", "expand"}
_OFFICIAL_ATTENTION = {"num_heads", "rotary_emb_dim", "window_size"}


def read(content: dict[str, Any]) -> dict[str, Any]:
    """The content of `HNetConfig` in our JSON, from the official JSON of a network.

    Raises ConfigError for an unknown key, a missing key or a value of the wrong kind.
    """
    ssm: Any = content.get("ssm_cfg", {})
    attention: Any = content.get("attn_cfg")
    vocab_size, tied = content.get("vocab_size", 256), content.get("tie_embeddings", False)
    for name, keys, known in (
        ("configuration", content, _OFFICIAL_KEYS),
        ("ssm_cfg", ssm, _OFFICIAL_SSM),
        ("attn_cfg", attention, _OFFICIAL_ATTENTION),
    ):
        if not isinstance(keys, dict) or keys.keys() - known:
            unknown = sorted(keys.keys() - known) if isinstance(keys, dict) else keys
            raise ConfigError(
                f"official {name} has unknown content {reprlib.repr(unknown)}: the format has "
                f"{sorted(known)}"
            )
    if not _whole([*ssm.values(), vocab_size]) or not isinstance(tied, bool):
        raise ConfigError(
            f"official ssm_cfg={reprlib.repr(ssm)}, vocab_size={reprlib.repr(vocab_size)} and "
            f"tie_embeddings={reprlib.repr(tied)}: give whole numbers, and true or false"
        )
    layouts = _flatten_layout(content.get("arch_layout"))
    lists: dict[str, Any] = {name: content.get(name) for name in ("d_model", "d_intermediate")}
    lists |= {name: attention.get(name) for name in sorted(_OFFICIAL_ATTENTION)}
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) != len(layouts) or not _whole(values):
            raise ConfigError(
                f"official {name}={reprlib.repr(values)}: give a list of {len(layouts)} whole "
                "numbers, one for each stage of arch_layout"
            )
    stages: list[dict[str, Any]] = [
        {"arch_layout": layout, **{name: values[i] for name, values in lists.items()}}
        for i, layout in enumerate(layouts)
    ]
    if len(stages) > 2:  # official target ratios: 6 with one chunking stage, 3 in each of two
        stages = [stage | {"chunking": {"target_ratio": 3.0}} for stage in stages[:-1]] + stages[
            -1:
        ]
    return {"stages": stages, "vocab_size": vocab_size, "ssm": ssm, "tie_embeddings": tied}


def _whole(values: list[Any]) -> bool:
    return all(type(v) is int and abs(v) < 2**31 for v in values)


def _flatten_layout(nested: Any) -> list[tuple[str, ...]]:
    """``["m4", ["T22"], "m4"]`` -> ``[("m4", "m4"), ("T22",)]``."""
    flat: list[tuple[str, ...]] = []
    while True:
        match nested:
            case [str(stack)]:
                return [*flat, (stack,)]
            case [str(encoder), list(inner), str(decoder)]:
                flat.append((encoder, decoder))
                nested = inner
            case _:
                raise ConfigError(
                    f"arch_layout {reprlib.repr(nested)} is not [encoder, [inner], decoder] or "
                    "[stack]"
                )
