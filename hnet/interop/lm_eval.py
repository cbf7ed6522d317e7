"""The command of lm-evaluation-harness with our models registered as `hnet`.

    python -m hnet.interop.lm_eval --model hnet --model_args checkpoint=WORKDIR --tasks NAME

All arguments are those of `lm_eval`, see `hnet.interop.harness`.
"""

from hnet.command_line import run
from hnet.errors import ConfigError


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate

        import hnet.interop.harness  # noqa: F401, registers the name
    except ImportError as e:
        raise ConfigError(
            f"lm-evaluation-harness cannot be imported ({e}): pip install 'hnet-jax[harness]'"
        ) from None
    cli_evaluate()


if __name__ == "__main__":
    run(main)
