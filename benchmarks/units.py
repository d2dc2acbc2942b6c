"""How pure the released network's units are: the gallery and the table in benchmarks/README.md.

    python benchmarks/units.py ESC-10 OUT [WORKERS]
    python benchmarks/units.py OUT  # a gallery: its files and size, and when its index can be used (Chromium)

With edge frames and without; beside it, a network of the same size that has learnt nothing (untrained.py; its
batch norms have heard the same sounds), and chance: the same top sounds with the labels of all sounds
permuted, 1,000 times. Units with fewer than nine sounds above 0 are left out of purities.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
from untrained import untrained

import soundnet_port as sp
from soundnet_port.viewing.gallery import write_gallery
from soundnet_port.viewing.unit_search import top_sounds

LAYERS = ["conv5", "conv7"]
TOP, PURE = 9, 7  # sounds of a unit, and how many of one class make it a pure one
PERMUTATIONS = 1000


def purities(found, layer, labels):
    """Of a layer's living units with all their sounds, for each row of labels: (rows, units)."""
    place = {sound: number for number, sound in enumerate(labels["paths"])}
    units = [u for u in found.units if u.layer == layer and len(u.sounds) == found.top]
    sounds = np.array([[place[each.path] for each in unit.sounds] for unit in units])
    counts = [(labels["rows"][:, sounds] == c).sum(-1) for c in range(labels["classes"])]
    return np.max(counts, axis=0)


def measured(name, model, data, edge_frames, workers):
    began = time.monotonic()
    found = top_sounds(model, labels=data, layers=LAYERS, top=TOP, edge_frames=edge_frames, workers=workers)
    elapsed = time.monotonic() - began
    targets, random = np.array(data.targets), np.random.default_rng(0)
    permuted = np.array([random.permutation(targets) for _ in range(PERMUTATIONS)])
    for layer in LAYERS:
        units = [unit for unit in found.units if unit.layer == layer]
        labels = {"paths": [str(sound.path) for sound in data.sounds], "classes": len(data.classes)}
        real = purities(found, layer, labels | {"rows": targets[None]})[0]
        by_chance = purities(found, layer, labels | {"rows": permuted})
        yield {
            "network": name,
            "edge frames": edge_frames,
            "layer": layer,
            "units": len(units),
            "dead": sum(unit.dead for unit in units),
            "counted": len(real),
            "purity": real.mean() / TOP,
            "chance": by_chance.mean() / TOP,
            "highest by chance": by_chance.mean(1).max() / TOP,
            "pure": int((real >= PURE).sum()),
            "pure by chance": (by_chance >= PURE).sum(1).mean(),
            "classes of pure units": len(
                {u.label for u in units if len(u.sounds) == TOP and u.purity >= PURE / TOP}
            ),
            "different sounds": len({sound.path for unit in units for sound in unit.sounds}),
            "selectivity": float(np.mean([unit.selectivity for unit in units if not unit.dead])),
            "seconds": elapsed,
        }


CARDS = """new MutationObserver((_, observer) => {
  if (!document.querySelector("#cards li")) return;
  globalThis.cards = performance.now();
  observer.disconnect();
}).observe(document, { childList: true, subtree: true });"""
TIMES = """() => {
  const [page] = performance.getEntriesByType("navigation");
  const [paint] = performance.getEntriesByName("first-contentful-paint");
  const height = document.documentElement.scrollHeight;
  return { "DOM interactive": page.domInteractive, cards: globalThis.cards, paint: paint?.startTime, height };
}"""


def measure_index(folder):
    """Print the size of a gallery, and when its index can be used: medians of nine loads without a cache."""
    import shutil

    from playwright.sync_api import sync_playwright

    files = [path for path in folder.rglob("*") if path.is_file()]
    print(f"gallery: {len(files):,} files, {sum(path.stat().st_size for path in files) / 1e6:.1f} MB")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width in (1280, 390):
            loads = []
            for _ in range(9):
                context = browser.new_context(viewport={"width": width, "height": 900})
                page, requested = context.new_page(), []
                page.on("request", lambda request, requested=requested: requested.append(request.url))
                page.add_init_script(CARDS)
                page.goto((folder / "index.html").resolve().as_uri(), wait_until="networkidle")
                local = [folder / url.partition(f"{folder.name}/")[2] for url in requested if "file:" in url]
                loads.append(page.evaluate(TIMES) | {"kB": sum(path.stat().st_size for path in local) / 1e3})
                context.close()
            medians = {key: round(float(np.median([load[key] for load in loads]))) for key in loads[0]}
            print(f"index, {width} pixels wide (ms, pixels, kB): {medians}, {len(local)} files")
        browser.close()


def main():
    if len(sys.argv) == 2:
        measure_index(Path(sys.argv[1]))
        return
    source, output = sys.argv[1], Path(sys.argv[2])
    workers = int(sys.argv[3]) if len(sys.argv) > 3 else None
    data = sp.read_labeled(source)
    released = sp.load_pretrained("soundnet8")
    plain = untrained((sound.path for sound in data.sounds), released.architecture)
    for name, model in (("released", released), ("untrained", plain)):
        for edge_frames in (False, True):
            for row in measured(name, model, data, edge_frames, workers):
                print(json.dumps(row), flush=True)
    began, cpu = time.monotonic(), time.process_time()
    write_gallery(released, output, labels=data, workers=workers, force=True)
    print(
        f"gallery: {time.monotonic() - began:.1f} s, {time.process_time() - cpu:.1f} s of CPU in this process"
    )


if __name__ == "__main__":
    main()
