"""Show the chunks of a trained model in a text: `hnet.commands.segment`."""

from hnet.command_line import run
from hnet.commands.segment import main

if __name__ == "__main__":
    run(main)
