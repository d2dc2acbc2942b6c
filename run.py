#!/usr/bin/env python3
"""Run the demo or the tests, or build the documentation, in an environment set up in .venv.

Usage: python3 run.py demo|test|docs
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BIN = ROOT / ".venv" / ("Scripts" if os.name == "nt" else "bin")


def install(extras: str = "") -> None:
    """Install the project into .venv, with the versions of constraints.txt."""
    if not (BIN / "pip").exists() and not (BIN / "pip.exe").exists():
        venv.create(ROOT / ".venv", with_pip=True)
    command = [BIN / "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "-c", "constraints.txt", "-e", f".{extras}"], cwd=ROOT, check=True)


def main(arguments: list[str]) -> int:
    """Run a task; return its exit code."""
    if arguments[:1] == ["demo"]:
        install()
        command = [BIN / "soundnet-port", "demo"]
    elif arguments[:1] == ["test"]:
        install("[test]")
        command = [BIN / "pytest", "-n", "auto", "--dist", "loadfile", *arguments[1:]]
    elif arguments[:1] == ["docs"]:
        install("[docs]")
        site = Path(*arguments[1:2] or [ROOT / "docs" / "_build"])
        command = [BIN / "sphinx-build", "-n", "-W", "--keep-going", "-q", ROOT / "docs", site]
    else:
        print(__doc__, file=sys.stderr)
        return 2
    environment = dict(os.environ)
    if arguments[:1] == ["test"]:
        # pytest starts a process per CPU, so torch gets one thread in each
        environment.setdefault("OMP_NUM_THREADS", "1")
        # tests start many interpreters, which would each compile the package anew
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return subprocess.run(command, cwd=ROOT, check=False, env=environment).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"run.py: {' '.join(map(str, error.cmd))} failed")
