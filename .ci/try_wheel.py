"""Is a wheel enough? Installs it into a clean environment of each Python that is here, and explains two pictures.

python .ci/try_wheel.py dist/vitae_hf-0.2.0-py3-none-any.whl
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def runs(python: str | None) -> bool:
    """Whether this is a Python: some managers put programs in the path that only say that a version is missing."""
    return bool(python) and not subprocess.run([python, "--version"], capture_output=True, check=False).returncode


def try_wheel(wheel: Path, python: str, folder: Path) -> dict:
    """The record of `vitae explain` in an environment that has the wheel with its extra and nothing else."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
    programs = folder / "venv" / "bin"
    requirement = f"vitae-hf[explain] @ {wheel.resolve().as_uri()}"
    subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", requirement], check=True, env=variables)
    command = [programs / "vitae", "explain", "vitae-nano-fashion"]
    done = subprocess.run(command, cwd=folder, env=variables, check=True, stdout=subprocess.PIPE, text=True)
    *lines, record = map(json.loads, done.stdout.splitlines())
    assert [line["labels"][0]["label"] for line in lines][1] == "Sneaker", lines
    return record


def main(wheel: Path) -> None:
    pythons = {version: shutil.which(f"python{version}") for version in VERSIONS}
    found = [version for version in VERSIONS if runs(pythons[version])]
    for version in found:
        with tempfile.TemporaryDirectory() as folder:
            record = try_wheel(wheel, pythons[version], Path(folder))
        print(f"Python {version}: {wheel.name} explains {record['images']} pictures, torch {record['torch']}")
    if not found:
        sys.exit(f"no Python of {', '.join(VERSIONS)} is here")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
