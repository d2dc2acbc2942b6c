"""Make the files by which the released SoundNet-8 is recognized and checked: fingerprints and recordings.

    python benchmarks/make_released.py sound8.npy RECORDINGS

sound8.npy is the released network as the source package soundnet 0.1.2 carries it; RECORDINGS the folder with
torch7.npz and torch7.json, real Torch7's outputs for the example sounds. Writes
conversion/soundnet8_fingerprints.json and conversion/soundnet8_torch7.npz.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from soundnet_port.conversion.golden import sample_evenly
from soundnet_port.conversion.ports import read_port
from soundnet_port.conversion.recognition import fingerprint
from soundnet_port.conversion.released_parity import ORDINARY, SOFTMAX, VALUES
from soundnet_port.network.weights import checksum

CONVERSION = Path(__file__).parent.parent / "conversion"
# an edge frame in the head, and all three sounds without
INPUTS = ("waves_x2", "waves_x3", "baby_x3", "helicopter_x3")
HEADS = {"obj": "objects", "scn": "scenes"}


def main(npy: Path, folder: Path) -> None:
    """Write both files."""
    network = read_port(npy)
    state = {name: network.state[name] for name in network.architecture.state_shapes()}
    about = {
        "about": "The released SoundNet-8, by tensor: sha256 (little-endian float32), norm, sum, projections",
        "source": {"file": npy.name, "sha256": hashlib.sha256(npy.read_bytes()).hexdigest()},
        "checksum": checksum(state),
    }
    # a tensor a line
    lines = [f"  {json.dumps(name)}: {json.dumps(fingerprint(tensor))}" for name, tensor in state.items()]
    head = json.dumps(about, indent=1).removesuffix("\n}")
    text = f'{head},\n "tensors": {{\n' + ",\n".join(lines) + "\n }\n}\n"
    (CONVERSION / "soundnet8_fingerprints.json").write_text(text, "utf-8")

    recorded = np.load(folder / "torch7.npz")
    description = json.loads((folder / "torch7.json").read_text("utf-8"))
    made_by = {name: description[name] for name in ("torch7", "nn", "luajit", "blas")}
    inputs = [
        {
            "example": description["inputs"][name]["file"].removesuffix(".flac"),
            "repetitions": description["inputs"][name]["repetitions"],
            "sha256": description["inputs"][name]["waveform_sha256"],
        }
        for name in INPUTS
    ]
    arrays = {"about": np.array(json.dumps({**made_by, "weights": checksum(state), "inputs": inputs}))}

    def keep(key: str, shape: tuple[int, ...], values: np.ndarray, largest: float) -> None:
        arrays[f"{key}/shape"] = np.array(shape)
        arrays[f"{key}/values"] = values.astype(np.float32)
        arrays[f"{key}/largest"] = np.array(largest)

    for number, name in enumerate(INPUTS):
        modules = {f"m{module:02d}": str(module) for module in range(1, 25)}
        softmaxes = {f"{recorded_name}_softmax": output + SOFTMAX for recorded_name, output in HEADS.items()}
        for recorded_name, output in (modules | HEADS | softmaxes).items():
            stats = recorded[f"{name}/{recorded_name}/stats"]
            shape = tuple(recorded[f"{name}/{recorded_name}/shape"][1:3])
            largest = max(abs(stats[5]), abs(stats[6]))
            if f"{name}/{recorded_name}/full" in recorded.files:
                full = recorded[f"{name}/{recorded_name}/full"].reshape(shape)
                keep(f"{number}/{output}", shape, sample_evenly(full, VALUES), largest)
            else:
                indices = np.arange(VALUES) * int(np.prod(shape)) // VALUES
                assert (recorded[f"{name}/{recorded_name}/subidx"] == indices).all()
                keep(f"{number}/{output}", shape, recorded[f"{name}/{recorded_name}/sub"], largest)
            if output == "24":
                ordinary = full[:, :-1]
                keep(
                    f"{number}/24{ORDINARY}",
                    ordinary.shape,
                    sample_evenly(ordinary, VALUES),
                    np.abs(ordinary).max(),
                )
    np.savez_compressed(CONVERSION / "soundnet8_torch7.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
