"""Time of a conversion and of its proof, and peak memory against the size of the file.

Usage: conversion.py FILE.t7. Each run is a process of its own; memory is counted above a process
that has imported torch and nothing else.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = """
import resource, sys, torch
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from soundnet_port.conversion.convert import convert
(report,) = convert(sys.argv[1], sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(report.seconds, report.proof_seconds, (peak - base) * 1024)
"""


def main(path: str) -> None:
    """Prints a line per run, and one for reading the same bytes as the baseline."""
    size = Path(path).stat().st_size
    start = time.perf_counter()
    Path(path).read_bytes()
    print(f"{path}: {size:,} bytes; only reading it takes {time.perf_counter() - start:.3f} s")
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", RUN, path, Path(folder, "w.safetensors")],
                check=True,
                capture_output=True,
                text=True,
            )
        seconds, proof, peak = map(float, done.stdout.split())
        print(
            f"conversion {seconds:.2f} s, proof {proof:.2f} s, "
            f"peak memory {peak / 1e6:.0f} MB above torch's, {peak / size:.2f} times the file"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
