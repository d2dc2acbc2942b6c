"""Measure the time of a conversion and its parity check, and peak memory relative to the file's size.

Usage: conversion.py FILE.t7. Each run is a separate process; memory is counted above that of a process which
has imported torch alone.
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
(result,) = convert(sys.argv[1], sys.argv[2])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(result.seconds, result.parity_seconds, (peak - base) * 1024)
"""


def main(path: str) -> None:
    """Print a line per run, and one for reading the same bytes, the baseline."""
    size = Path(path).stat().st_size
    start = time.perf_counter()
    Path(path).read_bytes()
    print(f"{path}: {size:,} bytes; reading it takes {time.perf_counter() - start:.3f} s")
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            process = subprocess.run(
                [sys.executable, "-c", RUN, path, Path(folder, "w.safetensors")],
                check=True,
                capture_output=True,
                text=True,
            )
        seconds, parity_seconds, peak = map(float, process.stdout.split())
        print(
            f"conversion {seconds:.2f} s, parity check {parity_seconds:.2f} s, "
            f"peak memory {peak / 1e6:.0f} MB above torch's, {peak / size:.2f} times the file"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
