#!/usr/bin/env python3
"""Sets everything up in .venv and runs the demo or the tests, or builds the documentation.

Usage: python3 run.py demo|test|docs
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
BIN = HERE / ".venv" / ("Scripts" if os.name == "nt" else "bin")


def installed(extras: str = "") -> None:
    """Puts the project into .venv, in the versions of constraints.txt."""
    if not (BIN / "pip").exists() and not (BIN / "pip.exe").exists():
        venv.create(HERE / ".venv", with_pip=True)
    command = [BIN / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", "constraints.txt", "-e", f".{extras}"], cwd=HERE, check=True)


def main(arguments: list[str]) -> int:
    """Returns the exit code of what was run."""
    if arguments[:1] == ["demo"]:
        installed()
        command = [BIN / "soundnet-port", "demo"]
    elif arguments[:1] == ["test"]:
        installed("[test]")
        command = [BIN / "pytest", "-n", "auto", "--dist", "loadfile", *arguments[1:]]
    elif arguments[:1] == ["docs"]:
        installed("[docs]")
        site = Path(*arguments[1:2] or [HERE / "docs" / "_build"])
        command = [BIN / "sphinx-build", "-n", "-W", "--keep-going", "-q", HERE / "docs", site]
    else:
        print(__doc__, file=sys.stderr)
        return 2
    # tests run side by side, one for each CPU; torch's threads would get into each other's way
    alone = {"OMP_NUM_THREADS": "1"} if arguments[:1] == ["test"] else {}
    return subprocess.run(command, cwd=HERE, check=False, env={**alone, **os.environ}).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"run.py: {' '.join(map(str, error.cmd))} failed")
