"""Commands of a finished run, in the package and so in its wheel.

    hnet segment | generate | evaluate | convert | verify | checkpoint ...

The first three are also `python -m experiments.NAME`; convert and verify are `python -m
hnet.interop`, checkpoint is `python -m hnet.checkpoint`.
"""
