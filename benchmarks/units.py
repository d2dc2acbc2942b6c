"""How pure the demonstration network's units are: the gallery and the table of docs/units.md.

    python benchmarks/units.py ESC-10 OUT [WORKERS]

Beside it, a network of the same size that has learnt nothing (untrained.py; its batch norms have heard the
same sounds), and chance: the same top sounds with the labels of all sounds permuted, 1,000 times.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from untrained import untrained

import soundnet_port as sp
from soundnet_port.gallery import write_gallery
from soundnet_port.units import top_sounds

LAYERS = ["conv5", "conv7"]
# fold, top sounds, how many of one class make a pure unit
CORPORA = ((None, 9, 7), ("5", 5, 4))
PERMUTATIONS = 1000


def purities(found, layer, labels):
    """Of a layer's living units with all their sounds, for each row of labels: (rows, units)."""
    place = {sound: number for number, sound in enumerate(labels["paths"])}
    units = [u for u in found.units if u.layer == layer and len(u.sounds) == found.top]
    sounds = np.array([[place[each.path] for each in unit.sounds] for unit in units])
    counts = [(labels["rows"][:, sounds] == c).sum(-1) for c in range(labels["classes"])]
    return np.max(counts, axis=0)


def measured(name, model, data, fold, top, pure, workers):
    chosen = [(s, t) for s, t in zip(data.sounds, data.targets, strict=True) if fold in (None, s.fold)]
    began = time.monotonic()
    found = top_sounds(model, labels=data, fold=fold, layers=LAYERS, top=top, workers=workers)
    elapsed = time.monotonic() - began
    targets, random = np.array([target for _, target in chosen]), np.random.default_rng(0)
    permuted = np.array([random.permutation(targets) for _ in range(PERMUTATIONS)])
    for layer in LAYERS:
        units = [unit for unit in found.units if unit.layer == layer]
        labels = {"paths": [str(s.path) for s, _ in chosen], "classes": len(data.classes)}
        real = purities(found, layer, labels | {"rows": targets[None]})[0]
        by_chance = purities(found, layer, labels | {"rows": permuted})
        yield {
            "network": name,
            "fold": fold or "all",
            "layer": layer,
            "units": len(units),
            "dead": sum(unit.dead for unit in units),
            "counted": len(real),
            "purity": real.mean() / top,
            "chance": by_chance.mean() / top,
            "highest by chance": by_chance.mean(1).max() / top,
            "pure": int((real >= pure).sum()),
            "pure by chance": (by_chance >= pure).sum(1).mean(),
            "of": f"{pure} of {top}",
            "classes of pure units": len(
                {unit.label for unit in units if unit.purity and unit.purity >= pure / top - 1e-9}
            ),
            "selectivity": float(np.mean([unit.selectivity for unit in units if not unit.dead])),
            "seconds": elapsed,
        }


def main():
    source, output = sys.argv[1], Path(sys.argv[2])
    workers = int(sys.argv[3]) if len(sys.argv) > 3 else None
    data = sp.read_labelled(source)
    demo = sp.load_pretrained("demo")
    plain = untrained((sound.path for sound in data.sounds), demo.architecture)
    for fold, top, pure in CORPORA:
        for name, model in (("demo", demo), ("untrained", plain)):
            for row in measured(name, model, data, fold, top, pure, workers):
                print(json.dumps(row), flush=True)
    began, cpu = time.monotonic(), time.process_time()
    write_gallery(demo, output, labels=data, workers=workers, force=True)
    print(
        f"gallery: {time.monotonic() - began:.1f} s, {time.process_time() - cpu:.1f} s of CPU in this process"
    )


if __name__ == "__main__":
    main()
