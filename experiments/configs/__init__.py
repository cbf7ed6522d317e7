"""Named configurations: `python -m experiments.pretrain NAME`.

Every public function without arguments in a file here defines a named configuration: it returns a
run's `Config` or an `HNetConfig`. `config` gets the name of its file, every other function its own
name without a leading `config_`. `pretrain --list` prints the first docstring lines
(`hnet.train.named` looks names up).

A function that reproduces a published system says so in its docstring, with one paragraph for each
of `hnet.train.named.FACTS` that begins with its name and a colon:

    Paper: arXiv 2407.08818
    Fidelity: what is as in the paper's code, what differs and why
    Test: tests/chunking/systems/test_magnet.py, the numbers that it is compared with

`python -m experiments.configs` prints SYSTEMS.md, the table of these facts beside the parts of each
configuration; after a change: `python -m experiments.configs > experiments/configs/SYSTEMS.md`.
"""
