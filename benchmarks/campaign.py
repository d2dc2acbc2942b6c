"""Search the property tests' input spaces for as long as you like.

Usage: python benchmarks/campaign.py [FACTOR] [pytest's arguments]

FACTOR multiplies each test's number of cases: 1 is what the tests name, 10 the default here; the ordinary
test run takes a quarter. Cases that fail are kept in .hypothesis/ and tried again by every later run.
"""

import os
import subprocess
import sys


def main(arguments: list[str]) -> int:
    factor, rest = (arguments[0], arguments[1:]) if arguments else ("10", [])
    command = [sys.executable, "-m", "pytest", "-m", "hypothesis", "-n", "auto", "--dist", "load", *rest]
    alone = {"OMP_NUM_THREADS": "1", "SOUNDNET_SEARCH": factor}
    return subprocess.run(command, check=False, env={**os.environ, **alone}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
