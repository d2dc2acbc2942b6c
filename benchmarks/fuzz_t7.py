"""Damages real Torch7 files at random for SECONDS and feeds them to the reader and the converter.

Usage: fuzz_t7.py SECONDS [SEED]. Only our own exceptions may come out, in good time; what converts
all the same must be proven against the damaged file. The failing input is kept and named.
"""

import io
import random
import struct
import sys
import tempfile
import time
from pathlib import Path

from soundnet_port.conversion import t7
from soundnet_port.conversion.convert import Refused, convert, verify

HERE = Path(__file__).resolve().parent.parent
LONGEST = 5.0  # seconds for one input: more is a hang
EVERY = 50  # inputs per whole conversion
INTEGERS = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 64, 255, 2**16, 2**31 - 1, -(2**31)]
LONGS = [-1, 0, 1, 2**31, 2**40, 2**62, -(2**63)]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file with a few places overwritten, cut out, inserted, swapped, or cut short."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out))
        kind = rng.randrange(7)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + 4] = struct.pack("<i", rng.choice(INTEGERS))
        elif kind == 2:
            out[at : at + 8] = struct.pack("<q", rng.choice(LONGS))
        elif kind == 3:
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8)))
        elif kind == 5:
            other = rng.randrange(len(out))
            out[at : at + 16], out[other : other + 16] = out[other : other + 16], out[at : at + 16]
        else:
            del out[rng.randrange(len(out)) :]
        if not out:
            return b""
    return bytes(out)


def read(data: bytes) -> bool:
    """Whether the reader accepts it; loads all tensors then."""
    try:
        root = t7._parse("fuzz", io.BytesIO(data), len(data)).root
        stack, seen = [root], set()
        while stack:
            value = stack.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, t7.Tensor):
                value.array()
            elif isinstance(value, t7.LuaObject):
                stack.append(value.fields)
            elif isinstance(value, dict):
                stack += [*value, *value.values()]
    except t7.T7Error:
        return False
    return True


def converts(data: bytes, folder: Path) -> bool:
    """Whether it converts; then the weights are verified against it once more."""
    source, weights = folder / "fuzz.t7", folder / "fuzz.safetensors"
    source.write_bytes(data)
    (result,) = convert(source, weights, force=True) if t7.members(source) == [None] else (Refused(),)
    if isinstance(result, Refused):
        return False
    verify(weights, source)
    return True


def main(seconds: float, seed: int) -> int:
    """Runs for so long; returns the exit code."""
    rng = random.Random(seed)
    paths = [HERE / "conversion" / "demo.t7", *sorted((HERE / "tests" / "reference").glob("*.t7"))]
    files = [path.read_bytes() for path in paths]
    # damage to the numbers is dull: most of it should hit the structure
    heads = [data[: data.find(b"modules") + 6_000] for data in files]
    count = accepted = converted = whole = 0
    slowest, end = 0.0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            number = rng.randrange(len(files))
            data = files[number]
            if rng.random() < 0.7:
                data = damaged(heads[number], rng) + data[len(heads[number]) :]
            else:
                data = damaged(data, rng)
            start = time.monotonic()
            try:
                accepted += read(data)
                if count % EVERY == 0:
                    whole += 1
                    converted += converts(data, Path(folder))
            except Refused:
                pass
            except BaseException:
                kept = Path(tempfile.gettempdir(), f"fuzz-{seed}-{count}.t7")
                kept.write_bytes(data)
                print(f"input {count} of seed {seed} got through; kept as {kept}")
                raise
            took = time.monotonic() - start
            if took > LONGEST:
                print(f"input {count} of seed {seed} took {took:.1f} s")
                return 1
            slowest = max(slowest, took)
            count += 1
    print(
        f"{count:,} inputs (seed {seed}): {accepted:,} read, the rest refused; {whole:,} whole conversions, "
        f"{converted:,} of them proven, the rest refused; slowest {slowest:.2f} s"
    )
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
