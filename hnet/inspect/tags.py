"""TensorBoard tags and descriptions of the fields of metrics.jsonl.

TensorBoard groups tags by the part before the first slash and sorts the groups. Here they are
``eval/`` (whose first card is bits per byte of held-out text), ``optim/``, ``probe/`` (texts whose
boundaries are shown), ``stage0/`` and so on, ``throughput/`` and ``train/``.
"""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from hnet.printable import printable


class Tag(NamedTuple):
    """A tag and its description, which is Markdown."""

    name: str
    description: str


_BPB = "Bits per byte: cross-entropy in bits over the number of source bytes"
_PROBE = "of the probe texts, in bytes."
_F1 = "of this stage's boundaries with gold boundaries of this kind, pooled over the probe texts"
# fmt: off
_MOVED = {
    r"loss/ce": (r"train/loss/ce", "Mean cross-entropy over all learned targets, in nats."),
    r"loss/total": (r"train/loss/total", "What is minimised: cross-entropy plus the weighted "
                    "losses of all stages."),
    r"loss/(.+)": (r"train/loss/\1", "One part of the loss."),
    r"grad_norm": (r"optim/grad_norm", "Norm of the gradient before it is clipped."),
    r"grad_norm/(.+)": (r"optim/grad_norm/\1", "Norm of the gradient of one part of the network, "
                        "before it is clipped."),
    r"update_norm": (r"optim/update_norm", "Norm of the change of all parameters by the update."),
    r"update_norm/(.+)": (r"optim/update_norm/\1", "Norm of the change of one part of the "
                          "network by the update."),
    r"spike": (r"optim/spike", "1 if this update was skipped because its loss or its gradient norm "
               "was far above the running mean, else 0."),
    r"spikes": (r"optim/spikes", "Updates skipped as spikes since the first step."),
    r"learning_rate": (r"optim/learning_rate", "Learning rate after the schedule."),
    r"skipped_in_a_row": (r"optim/skipped_in_a_row", "Updates in a row that were skipped because "
                          "the loss or the gradient was not finite."),
    r"bytes_seen": (r"throughput/bytes_seen", "Source bytes trained on since the first step."),
    r"bytes_seen/(.+)": (r"throughput/bytes_seen/\1", "Source bytes of this source trained on "
                         "since the first step."),
    r"bytes": (r"throughput/bytes_per_step", "Source bytes of this step's batch."),
    r"bytes_per_sec": (r"throughput/bytes_per_sec", "Source bytes per second since the last logged "
                       "step, without compilation, all devices together."),
    r"mfu": (r"throughput/mfu", "Model FLOP utilization: operations of matrix products in forward "
             "and backward pass over the peak of the devices, since the last logged step."),
    r"input/stall_frac": (r"throughput/input_stall_frac", "Share of the time since the last logged "
                          "step spent waiting for data."),
}
"""Pattern of a field of metrics.jsonl -> (tag, description)."""
_KEPT = {
    r"train/bpb": f"{_BPB} (no BOS, EOS or padding) of this step's batch.",
    r"train/source_.+/bpb": f"{_BPB} of one source in this step's batch.",
    r"train/script_.+/bpb": f"{_BPB} in one script in this step's batch.",
    r"eval/bpb": f"{_BPB} of the held-out text.",
    r"eval/bytes": "Source bytes of held-out text that were scored.",
    r"eval/source_.+/bpb": f"{_BPB} of the held-out text of one source.",
    r"eval/script_.+/bpb": f"{_BPB} of the held-out text in one script. What belongs to no script, "
                           "such as a space, counts to the script before it.",
    r"eval/stage\d+/bytes_per_chunk": "Source bytes and separators per chunk, on held-out text.",
    r"eval/stage\d+/route_.+/positions_per_chunk": "Positions per chunk of one route, on held-out "
                                                   "text.",
    r"stage\d+/boundary_rate": "Share of the positions at which a chunk starts (F of the ratio "
                               "loss).",
    r"stage\d+/boundary_prob": "Mean probability of a boundary (G of the ratio loss).",
    r"stage\d+/target_rate": "Boundary rate that the configuration asks for.",
    r"stage\d+/bytes_per_chunk": "Source bytes and separators per chunk.",
    r"stage\d+/overflow_frac": "Share of the chunks that found no slot and were joined to the "
                               "chunk before: should be 0.",
    r"stage\d+/slot_utilization": "Share of the chunk slots that hold a chunk.",
    r"stage\d+/capacity": "Chunk slots per row.",
    r"stage\d+/max_slots": "Most chunk slots that a row of this batch asked for.",
    r"stage\d+/chunks": "Chunks of this step's batch, those without a slot included.",
    r"stage\d+/undecided_frac": "Share of the probabilities from 0.4 to 0.6.",
    r"stage\d+/aux_loss": "Sum of this stage's own losses before they are weighted.",
    r"stage\d+/prob_hist": "Distribution of the probability of a boundary over the positions of "
                           "this step's batch.",
    r"stage\d+/route_.+/boundary_rate": "Share of the positions of one route at which a chunk "
                                        "starts.",
    r"stage\d+/route_.+/positions_per_chunk": "Positions per chunk of one route.",
    r"stage\d+/.+": "A number that a part of this stage logs.",
    r"probe/stage\d+/bytes_per_chunk": f"Mean chunk length {_PROBE}",
    r"probe/stage\d+/chunk_bytes": f"Distribution of the chunk lengths {_PROBE}",
    r"probe/stage\d+/chunk_bytes_p\d+": f"Percentile of the chunk lengths {_PROBE}",
    r"probe/stage\d+/chunk_cv": "Standard deviation over mean of the chunk lengths of the probe "
                                "texts.",
    r"probe/stage\d+/chunk_longest": f"Longest chunk {_PROBE}",
    r"probe/stage\d+/utf8_split_frac": "Share of the boundaries in the probe texts that fall "
                                       "inside a UTF-8 character.",
    r"probe/stage\d+/undecided_frac": "Share of the probabilities from 0.4 to 0.6 in the probe "
                                      "texts.",
    r"probe/stage\d+/boundary_prob": "Distribution of the probability of a boundary in the probe "
                                     "texts.",
    r"probe/stage\d+/p_map": "Probability of a boundary over the first bytes of each probe text: "
                             "white 0, blue 1, grey after its end. Rows are numbered as the texts "
                             "of the Text tab.",
    r"probe/stage\d+/f1_.+_random": f"Expected F1 {_F1}, if as many boundaries lay anywhere: a "
                                    "control.",
    r"probe/stage\d+/f1_.+_stride": f"F1 {_F1}, if as many boundaries were evenly spaced: a "
                                    "control.",
    r"probe/stage\d+/f1_.+": f"F1 {_F1}.",
    r"probe/stage\d+/route_.+/bytes_per_chunk": "Mean chunk length of the probe texts in one route "
                                                "or script, in bytes.",
    r"probe/text_\d+": "A probe text: | where a chunk of stage 0 starts, ‖ one of stage 1 too.",
    r"configuration": "The configuration of this start.",
}
"""Pattern of a field whose tag has the name of the field -> description."""
# fmt: on
_OTHER = (r"train/\1", "A number that the code of this run logs itself.")
_RULES = tuple(
    (re.compile(field, re.DOTALL), tag, description)
    for field, (tag, description) in {
        **_MOVED,
        **{f"({field})": (r"\1", description) for field, description in _KEPT.items()},
        "(.+)": _OTHER,
    }.items()
)


def tag_of(field: str) -> Tag:
    """Tag and description of a field of metrics.jsonl; the first matching rule applies."""
    for pattern, tag, description in _RULES:
        if found := pattern.fullmatch(field):
            return Tag(printable(found.expand(tag)), description)
    raise ValueError(f"field {field!r} has no tag")


def without_folders(names: Iterable[str]) -> dict[str, str]:
    """Map each glob or file to the shortest end of its path that is unique."""
    names = list(dict.fromkeys(names))
    parts = {name: name.split(os.sep) for name in names}
    labels: dict[str, str] = {}
    for name in names:
        for length in range(1, len(parts[name]) + 1):
            end = parts[name][-length:]
            if sum(other[-length:] == end for other in parts.values()) == 1:
                break
        label = shown = os.sep.join(end).lstrip(os.sep)
        n = 1
        while label in labels.values():
            n += 1
            label = f"{shown} ({n})"
        labels[name] = label
    return labels
