# `just` lists these; each is one command of the environment that is active.

default:
    @just --list

# the quick tier (tests/README.md)
quick:
    python -m pytest -q -m quick

# all tests
test:
    python -m pytest -q

# the Boundaries tab in a browser
browser:
    python -m pytest -q tests/inspect/test_browser.py

# several hosts emulated on this machine
hosts:
    python -m pytest -q tests/train/test_training_hosts.py tests/runtime/test_distributed.py tests/tpu/test_emulate.py

# plans for accelerators that are not here
plans:
    python -m pytest -q tests/tpu/test_plan.py tests/tpu/test_gpus.py

# form and types
lint:
    ruff format --check .
    ruff check .
    mypy
