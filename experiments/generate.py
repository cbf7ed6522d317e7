"""Text from a trained model: `hnet.commands.generate`."""

from hnet.command_line import run
from hnet.commands.generate import main

if __name__ == "__main__":
    run(main)
