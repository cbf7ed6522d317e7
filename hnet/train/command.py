"""A run started by a command: join the processes, train to the end or a stop, print a summary."""

import bz2
import gzip
import lzma
import sys
import time

from hnet.command_line import FAILED
from hnet.decode.segment import segmenter
from hnet.errors import ConfigError
from hnet.inspect.render import print_segmentations
from hnet.inspect.segmentation import Segmentation
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.runtime.cpu import one_device_per_core
from hnet.runtime.distributed import REQUEUE_EXIT_CODE, host_id, initialize, num_hosts
from hnet.runtime.stop_request import StopRequest
from hnet.train.config import Config, MeshConfig
from hnet.train.first_lines import last_lines
from hnet.train.loop import evaluated_params, train
from hnet.train.session import Outcome, StopRun
from hnet.train.sharding import replicated
from hnet.train.tokenizer import with_tokenizer

COMPRESSED_BYTES = 32 << 20  # held-out text up to this size is compressed for comparison
PARAGRAPH_FROM = 1 << 20  # first bytes of held-out text, in which the longest paragraph is found
PARAGRAPH_BYTES = 400  # bytes of the held-out paragraph printed with its boundaries


def pretrain(config: Config) -> int:
    """Train to the end or to a stop request and print the result; returns the exit code."""
    initialize(config.distributed)
    with with_tokenizer(config) as config:
        if config.mesh == MeshConfig() and num_hosts() == 1:
            one_device_per_core(config.data.batch_size // config.train.accumulate)
        enable_compilation_cache()
        began = time.monotonic()
        outcome = train_to_end(config)
    if isinstance(outcome, int):
        return outcome
    if outcome.corpus.heldout.num_bytes:
        paragraph = _cut_paragraph(config, outcome)  # on all hosts: it uses the mesh
        if host_id() == 0:
            _conclude(outcome, time.monotonic() - began)
            print_segmentations(paragraph)
    if host_id() == 0:
        print(*last_lines(config), sep="\n")
    return 0


def train_to_end(config: Config) -> Outcome | int:
    """Call `train`, stoppable by signals; returns the exit code if training did not finish.

    The reason is printed.
    """
    with StopRequest() as stop:
        try:
            outcome = train(config, stop)
        except StopRun as e:
            print(f"error: {e}", file=sys.stderr)
            return FAILED
    if outcome.evaluation is None:
        print(f"stopped and saved at step {int(outcome.state.step)}: the same command resumes")
        return REQUEUE_EXIT_CODE
    return outcome


def _cut_paragraph(config: Config, outcome: Outcome) -> list[Segmentation]:
    if not config.model.num_chunked:
        return []
    text = b"".join(outcome.corpus.heldout.beginning(PARAGRAPH_FROM))
    paragraph = max(text.split(b"\n\n"), key=len)[:PARAGRAPH_BYTES]
    segment = segmenter(
        outcome.program.graph, config.model, replicated(outcome.program.mesh),
        bos=config.data.bos_eos,
    )  # fmt: skip
    params = evaluated_params(config, outcome.state)
    try:
        return segment(params, [paragraph], ["held-out paragraph"])
    except ConfigError:  # probabilities that are not finite; the evaluation has said so
        return []


def _conclude(outcome: Outcome, seconds: float) -> None:
    """Print held-out bits per byte and those of general-purpose compressors on the same bytes."""
    heldout = outcome.corpus.heldout
    print(f"\nheld-out text: {heldout.num_bytes:,} bytes; this start took {seconds:.0f} s")
    rows = {"this model": outcome.evaluation.bpb}
    if heldout.num_bytes <= COMPRESSED_BYTES:
        text = b"".join(heldout.texts())
        sizes = {
            "gzip -9": len(gzip.compress(text, 9)),
            "bz2 -9": len(bz2.compress(text, 9)),
            "xz -9": len(lzma.compress(text, preset=9)),
        }
        rows |= {name: 8 * size / len(text) for name, size in sizes.items()}
    for name, bpb in rows.items():
        print(f"  {name:<12}{bpb:7.3f} bits per byte")
    print()
