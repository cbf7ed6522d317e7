"""Our models in lm-evaluation-harness (the extra `harness`), under the name `hnet`.

    lm_eval --model hnet --model_args checkpoint=WORKDIR --tasks lambada_openai

The harness finds the name among the installed plugins. For a version without plugins (such as
0.4.13) importing this module registers the name: use `python -m hnet.interop.lm_eval`, which takes
the same arguments. In Python: `simple_evaluate(HarnessModel("WORKDIR"), tasks=[...])`.
"""

import os
from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from hnet.decode.generate import generate
from hnet.decode.prompts import encode
from hnet.decode.sampling import Sampling
from hnet.decode.score import logprobs
from hnet.errors import ConfigError
from hnet.interop import load
from hnet.model import HNetLM


@register_model("hnet")
class HarnessModel(LM):
    """Scores and continues bytes; a token of the harness is a byte here."""

    def __init__(
        self,
        checkpoint: HNetLM | str | os.PathLike,
        *,
        bos: bool | None = None,
        batch_size: int | str = 16,
        max_bytes: int = 256,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """checkpoint: a model in memory, or a path for `hnet.load`. batch_size: "auto" is 16.
        bos: whether to prepend byte 254; default: as the model was trained. max_bytes: maximum
        length of a continuation if the task sets no limit. max_batch_size and device are ignored:
        the harness passes them to every model, and JAX chooses the device."""
        super().__init__()
        del max_batch_size, device
        self.max_bytes = _count("max_bytes", max_bytes)
        self.batch_size = 16 if batch_size == "auto" else _count("batch_size", batch_size)
        self.model = checkpoint if isinstance(checkpoint, HNetLM) else load(checkpoint)
        self.bos = self.model.bos if bos is None else bos
        self.unscored = 0 if self.bos else 1  # without BOS the first byte is not predicted

    def _score(self, texts: Sequence[bytes]):
        return logprobs(self.model, texts, bos=self.bos, batch_size=self.batch_size)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of the continuation and whether it is greedy, for each request."""
        pairs = [tuple(encode(part) for part in request.args) for request in requests]
        scores = self._score([context + continuation for context, continuation in pairs])
        starts = [max(len(context), self.unscored) for context, _ in pairs]
        return [
            (score.total(start), bool(score.is_greedy[start:].all()))
            for start, score in zip(starts, scores)
        ]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, with the full text as context (no window)."""
        scores = self._score([encode(request.args[0]) for request in requests])
        return [score.total(self.unscored) for score in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first string of `until`; requests with equal settings are
        batched."""
        found: dict[int, str] = {}
        groups: dict[Sampling, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._sampling(request.args[1]), []).append(i)
        for sampling, members in groups.items():
            prompts = [requests[i].args[0] for i in members]
            results = generate(
                self.model, prompts, sampling, bos=self.bos, batch_size=self.batch_size
            )
            found |= {i: result.text for i, result in zip(members, results)}
        return [found[i] for i in range(len(requests))]

    def _sampling(self, settings: dict) -> Sampling:
        until = settings.get("until") or ()
        sampled = settings.get("do_sample", False)
        return Sampling(
            max_bytes=int(settings.get("max_gen_toks", self.max_bytes)),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(settings.get("top_k") or 0),
            top_p=float(settings.get("top_p", 1.0)),
            stop=(until,) if isinstance(until, str) else tuple(until),
        )


def _count(name: str, value: int | str) -> int:
    if str(value).isdecimal() and 0 < int(value) < 1 << 30:
        return int(value)
    raise ConfigError(f"{name}={value!r}: use a whole number from 1")
