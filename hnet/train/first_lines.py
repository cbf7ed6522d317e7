"""The lines that a run prints first and last: what it is, and what can be done with it."""

import json
import os
import shlex

import jax

from hnet.data import Corpus
from hnet.data.sources import is_built_in
from hnet.runtime.distributed import num_hosts
from hnet.train.compiled_run import CompiledRun
from hnet.train.config import Config
from hnet.train.log_folder import TENSORBOARD
from hnet.train.utilization import peak_of


def first_lines(config: Config, corpus: Corpus, program: CompiledRun, start: int) -> list[str]:
    """Work directory, model, devices, data and how to look, for a run that begins at this step."""
    data, steps = config.data, config.train.steps
    unit = "tokens" if data.tokenizer else "bytes"
    sources = [s for documents in corpus.train.documents for s in documents.sources]
    files = sum(1 if is_built_in(s.name) else len(s.files) for s in sources)
    lines = {
        "workdir": f"{config.workdir} ({f'resuming at step {start}' if start else 'new'})",
        "model": f"{_parameters(program):,} parameters, {json.dumps(config.model.arch_layout)}",
        "devices": _devices(program, config.model.compute.dtype),
        "data": (
            f"{corpus.train.num_bytes:,} bytes in {files} {'file' if files == 1 else 'files'}, "
            f"{corpus.heldout.num_bytes:,} bytes held out"
        ),
        "updates": f"{steps:,} of {data.batch_size} x {data.seq_len} {unit}",
        "look": f"tensorboard --logdir {_folder_above(config.workdir)}",
    }
    found = [f"{name:<9}{text}" for name, text in lines.items()] + [program.kernels]
    return found + ["compiling the first update"] if start < steps else found


def last_lines(config: Config) -> list[str]:
    """What a finished run saved, and three commands that use it."""
    where = shlex.quote(config.workdir)
    return [
        f"saved: {config.workdir}/checkpoints/{config.train.steps}, metrics.jsonl, {TENSORBOARD}/",
        "next:",
        f'  python -m experiments.segment --checkpoint {where} --text "Where does it cut this?"',
        f'  python -m experiments.generate --checkpoint {where} --prompt "The "',
        f"  python -m experiments.evaluate --checkpoint {where} --files '*.md'",
    ]


def _parameters(program: CompiledRun) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))


def _devices(program: CompiledRun, dtype: str) -> str:
    mesh = program.mesh
    kind = mesh.devices.flat[0].device_kind
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    hosts = f" on {num_hosts()} hosts" if num_hosts() > 1 else ""
    unknown = "" if peak_of(mesh, dtype) else "; peak FLOP/s unknown: no throughput/mfu"
    return f"{mesh.size} x {kind}{hosts}{f' ({axes})' if axes else ''}{unknown}"


def _folder_above(workdir: str) -> str:
    head, _ = os.path.split(workdir.rstrip("/"))
    return shlex.quote(head or ".")
