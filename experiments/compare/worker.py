"""One process of a comparison: plan the systems, train those that are free, write the tables."""

import os
import platform
import tempfile
import time
from collections.abc import Sequence, Set
from dataclasses import replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape

from experiments.compare.counts import counts_bpb, same_share
from experiments.compare.measure import measure, read_gold
from experiments.compare.report import FILES, check_plots, replace_file, write_report
from experiments.compare.settings import LOCAL, Compare
from experiments.compare.systems import (
    Costs,
    System,
    check_names,
    folder_name,
    learn_tokenizer,
    source_of,
)
from experiments.compare.train import train_system
from hnet.command_line import FAILED, one_line
from hnet.data import DataConfig, open_corpus
from hnet.data.identity import check_inputs, inputs
from hnet.data.tokenizers import TOKENIZERS
from hnet.dotted import differences
from hnet.errors import ConfigError, Failed, told
from hnet.fields import from_json, to_json
from hnet.files import json_text, read_json
from hnet.outputs import local_folder
from hnet.runtime.compile_cache import enable_compilation_cache
from hnet.runtime.cpu import one_device_per_core
from hnet.runtime.distributed import REQUEUE_EXIT_CODE
from hnet.runtime.stop_request import StopRequest
from hnet.train.lock import DirectoryLock, Locked

MOST_COUNTED = 1 << 24  # training bytes of the order-2 model: its arrays are ten times as large
IDLE_SECONDS = 2.0  # between two checks for systems that other workers may have left
PLAN, SYSTEM, ROW = "comparison.json", "system.json", "row.json"
UNITS = {
    "flops": ("training FLOPs per source byte", "training FLOPs/byte"),
    "parameters": ("parameters", "parameters"),
    "bytes_per_second": ("measured seconds of training per source byte", "s/byte"),
}
console = Console(highlight=False, soft_wrap=True)


class Comparison:
    """A comparison in its folder. Raises ConfigError before anything is written."""

    def __init__(self, names: Sequence[str], settings: Compare):
        self.folder = local_folder(settings.workdir, "workdir")
        check_plots()
        check_names([settings.reference])
        check_names(names)
        self.names, self.settings = list(names), settings
        self.seeds = range(settings.seed, settings.seed + settings.seeds)
        self.gold = read_gold(settings)
        self.corpus = open_corpus(settings.data)
        if not self.corpus.heldout.num_bytes:
            raise ConfigError("there is no held-out text: give --data.eval_files")
        self.failed: dict[str, str] = {}

    def run(self) -> int:
        """Train what is free and write the tables; returns the exit code."""
        one_device_per_core(self.settings.data.batch_size // self.settings.train.accumulate)
        enable_compilation_cache()
        with StopRequest() as stop:
            systems = self._planned(stop)
            ended = systems is not None and self._work(systems, stop)
        self.report()
        if not ended:
            console.print("stopped and saved: the same command resumes")
            return REQUEUE_EXIT_CODE
        for name, fault in self.failed.items():
            console.print(escape(f"failed: {name}: {fault}; the same command tries it again"))
        return FAILED if self.failed else 0

    # --- the plan ---------------------------------------------------------------------------------

    def _planned(self, stop: StopRequest) -> list[System] | None:
        """The systems at equal cost, from the folder or new; None if asked to stop."""
        said = False
        while not stop.stop_requested(0):
            try:
                with DirectoryLock(self.folder):
                    return self._plan()
            except Locked as e:  # another worker plans
                if not said:
                    console.print(escape(one_line(e)))
                said = True
            time.sleep(IDLE_SECONDS)
        return None

    def _plan(self) -> list[System]:
        content = self._stored()
        costs, budget = Costs(self.settings, self.corpus), content.get("budget")
        if budget is None:
            budget = costs.budget()
        files, systems = {}, []
        with tempfile.TemporaryDirectory() as scratch:
            for name in self.names:
                path = self.folder / folder_name(name) / SYSTEM
                if path.exists():
                    systems.append(self._begun(name, path))
                    continue
                tokenizer = None
                if name in TOKENIZERS:
                    tokenizer = Path(scratch) / f"{name}.json"
                    tokenizer.write_text(learn_tokenizer(self.settings, name, self.corpus))
                system = costs.system(name, budget, tokenizer)
                if tokenizer:
                    kept = self.folder / "tokenizers" / tokenizer.name
                    files[kept] = tokenizer.read_bytes()
                    data = replace(system.config.data, tokenizer=str(kept))
                    system = replace(system, config=replace(system.config, data=data))
                files[path] = _json(system.to_json())
                systems.append(system)
                self._say(system, budget)
        if not content:
            mine = {"settings": to_json(self.settings), "fingerprint": self.corpus.fingerprint}
            mine |= {"inputs": self._gold_read()}
            files[self.folder / PLAN] = _json(mine | {"budget": budget})
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, data)
        return systems

    def _begun(self, name: str, path: Path) -> System:
        """A planned system. Raises ConfigError if its configuration has changed since."""
        system = System.from_json(_read(path, "system", System.KEYS))
        if system.name != name:
            raise ConfigError(
                f"system {name!r} has the folder of {system.name!r} in workdir="
                f"{str(self.folder)!r}: rename its file, or use another workdir"
            )
        if system.source:
            check_inputs(
                {f"system {name!r}": system.source}, {f"system {name!r}": source_of(name)},
                f"the comparison in {self.folder}", "give it another name, or use another workdir",
            )  # fmt: skip
        return system

    def _stored(self) -> dict[str, Any]:
        """The plan in the folder, {} if there is none. Raises ConfigError for another one."""
        path = self.folder / PLAN
        if not path.exists():
            if found := [name for name in FILES if os.path.lexists(self.folder / name)]:
                raise ConfigError(
                    f"workdir={str(self.folder)!r}: no comparison wrote its {found[0]}: choose "
                    "another folder"
                )
            if not self.names:
                raise ConfigError(f"workdir={str(self.folder)!r} holds no comparison: name systems")
            return {}
        content = _read(path, "comparison", {"settings", "fingerprint", "budget"})
        theirs = to_json(from_json(Compare, content["settings"]))  # adds newer fields
        mine = to_json(self.settings)
        for part in (mine, theirs):
            for field in LOCAL:
                del part[field]
        if not self.names:
            mine = theirs
        for field, new, old in differences(mine, theirs):
            raise ConfigError(
                f"workdir={str(self.folder)!r} holds another comparison: {field} is {told(old)} "
                f"there, here {told(new)}: use that, or another workdir"
            )
        if self.names and content["fingerprint"] != self.corpus.fingerprint:
            raise ConfigError(
                f"workdir={str(self.folder)!r} holds a comparison on another text: fingerprint "
                f"{content['fingerprint']}, here {self.corpus.fingerprint}: use another workdir"
            )
        if self.names and "inputs" in content:  # not of an earlier version
            check_inputs(
                content["inputs"], self._gold_read(), f"the comparison in {self.folder}",
                "give it the same content, or use another workdir",
            )  # fmt: skip
        return content

    def _gold_read(self) -> dict[str, str]:
        return inputs(DataConfig(), None, {"gold": self.settings.gold})

    def _say(self, system: System, budget: float) -> None:
        model = system.config.model
        widths = ", ".join(str(stage.d_model) for stage in model.stages)
        off, unit = system.cost / budget - 1, UNITS[self.settings.match][1]
        console.print(
            escape(f"{system.name}: widths {widths}, {system.cost:.4g} {unit} ({off:+.1%})")
        )

    # --- the work ---------------------------------------------------------------------------------

    def _folder(self, system: System) -> Path:
        return self.folder / system.folder_name

    def _is_done(self, system: System) -> bool:
        return all((self._folder(system) / f"seed{n}" / ROW).exists() for n in self.seeds)

    def _work(self, systems: list[System], stop: StopRequest) -> bool:
        """Train systems until none is left, including those of workers that ended; False if asked
        to stop."""
        while left := [s for s in systems if not self._is_done(s) and s.name not in self.failed]:
            busy = 0
            for system in left:
                if stop.stop_requested(0):
                    return False
                try:
                    with DirectoryLock(self._folder(system)):
                        if not self._is_done(system) and not self._train(system, stop):
                            return False
                except Locked:
                    busy += 1
            if busy == len(left):
                time.sleep(IDLE_SECONDS)
        return True

    def _train(self, system: System, stop: StopRequest) -> bool:
        """Train and measure a system and write its rows; False if asked to stop."""
        console.print(escape(f"training {system.name}, {len(self.seeds)} seeds"))
        folder = self._folder(system)
        try:
            records = train_system(system, folder, self.seeds, self.corpus, stop)
        except Locked:
            raise
        except (Failed, ConfigError) as e:
            self.failed[system.name] = one_line(e)
            return True
        if records is None:
            return False
        records = {seed: record for seed, record in records.items() if isfinite(record["bpb"])}
        for seed, record in records.items():
            run = system.run(folder, seed)
            row = measure(self.settings, system, run, record, self.corpus.heldout, self.gold)
            replace_file(folder / f"seed{seed}" / ROW, _json(row))
            console.print(escape(f"{system.name} seed {seed}: {row['bpb']:.4f} bits per byte"))
        if missing := sorted(set(self.seeds) - set(records)):
            self.failed[system.name] = f"seeds {missing} have no result"
        return True

    # --- the tables -------------------------------------------------------------------------------

    def report(self) -> None:
        """Write the tables of all finished rows, also those of other workers."""
        files = sorted(self.folder.glob(f"*/seed*/{ROW}"))
        if not files:
            return
        content = _read(self.folder / PLAN, "comparison", {"settings", "fingerprint", "budget"})
        settings = from_json(Compare, content["settings"])
        unit = UNITS[settings.match][0]
        heldout = self.corpus.heldout.num_bytes
        read = same_share(self.corpus.train, min(settings.bytes or MOST_COUNTED, MOST_COUNTED))
        yardstick = counts_bpb(read, self.corpus.heldout.beginning(MOST_COUNTED))
        facts = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
            f"{jax.device_count()} x {jax.devices()[0].device_kind}, JAX {jax.__version__}",
            "equal for all": f"{unit}, {content['budget']:.4g}: what {settings.reference} costs "
            f"with {settings.parameters:,} parameters",
            "held-out text": f"{heldout:,} bytes (fingerprint {content['fingerprint']})",
            "learning rate": f"{settings.optim.learning_rate:g}, multipliers of the stages: "
            f"{settings.optim.lr_multipliers}",
            "order-2 model": f"{yardstick:.4f} bits per byte, by counts in "
            f"{sum(map(len, read)):,} training bytes, the same share of each document",
            "seeds": f"{settings.seed} to {settings.seed + settings.seeds - 1}",
        }
        write_report(
            self.folder, [_read(path, "row", {"system", "seed", "bpb"}) for path in files], facts
        )
        console.print(escape(f"wrote {self.folder / 'RESULTS.md'} and results.html"))


def _read(path: Path, what: str, keys: Set[str]) -> dict[str, Any]:
    """An object that a worker wrote. Raises ConfigError for a damaged file."""
    content = read_json(path, what)
    if not isinstance(content, dict) or not keys <= content.keys():
        raise ConfigError(f"{what} {str(path)!r} is damaged: restore or remove it")
    return content


def _json(content: Any) -> bytes:
    return (json_text(content, indent=1) + "\n").encode()
