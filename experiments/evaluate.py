"""Bits per byte of a trained model, and evaluations from papers: `hnet.commands.evaluate`."""

from hnet.command_line import run
from hnet.commands.evaluate import main

if __name__ == "__main__":
    run(main)
