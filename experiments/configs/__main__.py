"""The table of all named configurations, in Markdown.

    python -m experiments.configs > experiments/configs/SYSTEMS.md

Parts are read from the configurations, the other columns from the docstrings of their functions
(see `experiments.configs`).
"""

from hnet.chunking.config import ChunkingConfig
from hnet.command_line import OneLineParser, run
from hnet.config import HNetConfig
from hnet.train.named import FACTS, Named, named_configs

HEAD = """# Named configurations

Made by `python -m experiments.configs > experiments/configs/SYSTEMS.md`; do not edit. Parts: for
each stage from the outside in, `encoder [router, meaning of a boundary, pool, dechunk, residual,
losses] decoder`, with the widths of the stages after the colon. `m` is Mamba-2, `t` attention;
upper case adds an MLP. A paper is an arXiv number where there is one.
"""
COLUMNS = ("name", "what", "parts", *(fact.lower() for fact in FACTS), "command")


def table() -> str:
    """SYSTEMS.md."""
    rows = [_row(name, named) for name, named in named_configs().items()]
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    return "\n".join([HEAD, *lines]) + "\n"


def _row(name: str, named: Named) -> list[str]:
    facts = [named.facts.get(fact, "") for fact in FACTS]
    command = f"`python -m experiments.pretrain {name}`"
    cells = [f"`{name}`", named.summary, parts_text(named.load().model), *facts, command]
    return [cell.replace("|", "\\|") for cell in cells]


def parts_text(model: HNetConfig) -> str:
    """The layers, parts and widths of a network, in one line."""
    *chunked, core = model.stages
    text = core.arch_layout[0] + (f" ({core.vectors} vectors)" if core.vectors > 1 else "")
    for stage in reversed(chunked):
        encoder, decoder = stage.arch_layout
        if stage.passes > 1:
            decoder += f" ({stage.passes} passes)"
        text = f"{encoder} [{chunking_text(stage.chunking)}] {text} {decoder}"
    return f"{text}: {' / '.join(str(stage.d_model) for stage in model.stages)}"


def chunking_text(chunking: ChunkingConfig) -> str:
    """The parts of one stage."""
    meaning = chunking.alignment
    if meaning == "end":
        meaning += f" ({chunking.null} null)" if chunking.null != "first" else " (first chunk: 1)"
    losses = [f"{loss.name} {loss.weight:g}" for loss in chunking.losses]
    parts = [chunking.predictor.name, meaning, chunking.pool.name, chunking.dechunk.name,
             f"residual {chunking.residual}", *losses]  # fmt: skip
    scopes = {"encoder": chunking.encoder_scope, "decoder": chunking.decoder_scope}
    parts += [f"{stack} of a chunk" for stack, scope in scopes.items() if scope == "chunk"]
    if chunking.routes > 1:
        shared = "" if chunking.routed_parameters else ", one predictor"
        parts.append(f"{chunking.routes} routes{shared}")
    return ", ".join(parts)


def main() -> int:
    OneLineParser(prog="python -m experiments.configs", description=__doc__).parse_args()
    print(table(), end="")
    return 0


if __name__ == "__main__":
    run(main)
