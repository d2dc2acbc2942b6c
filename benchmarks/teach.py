r"""Compare a student with its teacher on sounds that it has not heard, beside constant answers and chance.

    soundnet-port label-sounds ESC-10/audio/[1-4]-*.ogg -o heard
    soundnet-port label-sounds ESC-10/audio/5-*.ogg -o unheard
    soundnet-port train heard/manifest.tsv -o run --architecture soundnet5 ...  # docs/train.md
    soundnet-port label-sounds ESC-10/audio/5-*.ogg -o student -w run/weights.safetensors
    python benchmarks/teach.py heard unheard student

Distributions are means over each sound. "top 1" is how often the first category of the student is the
teacher's, "top 5" how often the first of the teacher is among five of the student, "overlap" the mean number
of categories in both lists of five. The constant answer is the mean distribution of the teacher over the
sounds of the training; "shuffled" are the answers of the student to other sounds (100 permutations).
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from soundnet_port.learning.pseudo_labels import HEADS, read_label_file

SHUFFLES = 100


def read_labels(folder: Path, head: str) -> dict[str, NDArray[np.float64]]:
    """Return each sound's mean distribution by its labels' name."""
    with open(folder / "manifest.tsv", newline="", encoding="utf-8") as file:
        paths = [row[head] for row in csv.DictReader(file, delimiter="\t")]
    return {path: read_label_file(folder / path).mean(0, dtype=np.float64) for path in paths}


def compare(teacher: NDArray[np.float64], student: NDArray[np.float64]) -> list[float]:
    """Return top 1, top 5, overlap of the lists of five, and the divergence in nats."""
    first = teacher.argmax(1)
    lists, others = (np.argsort(-rows, 1, kind="stable")[:, :5] for rows in (student, teacher))
    divergence = (teacher * (np.log(teacher + 1e-30) - np.log(student + 1e-30))).sum(1)
    return [
        float((student.argmax(1) == first).mean()),
        float((lists == first[:, None]).any(1).mean()),
        float(np.mean([len(set(a) & set(b)) for a, b in zip(lists, others, strict=True)])),
        float(divergence.mean()),
    ]


def derange(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return a permutation without fixed points: a rotation of a random order."""
    order = random.permutation(count)
    result = np.empty(count, np.int64)
    result[order] = np.roll(order, 1)
    return result


def main(heard: str, unheard: str, student: str) -> None:
    """Print a table for each head."""
    random = np.random.default_rng(0)
    for head in HEADS:
        training = np.stack(list(read_labels(Path(heard), head).values()))
        teachers, students = read_labels(Path(unheard), head), read_labels(Path(student), head)
        assert set(teachers) == set(students), "the teacher and the student labeled different sounds"
        teacher, answers = (np.stack([rows[name] for name in teachers]) for rows in (teachers, students))
        constant = np.broadcast_to(training.mean(0), teacher.shape)
        categories = teacher.shape[1]
        uniform = np.full_like(teacher, 1 / categories)
        shuffled = [compare(teacher, answers[derange(len(teacher), random)]) for _ in range(SHUFFLES)]
        rows = {
            "student": compare(teacher, answers),
            "constant": compare(teacher, constant),
            "shuffled": np.mean(shuffled, 0).tolist(),
            "chance": [*np.array([1, 5, 25]) / categories, *compare(teacher, uniform)[3:]],
        }
        print(f"{head}, {len(teacher)} sounds".ljust(22) + "   top 1    top 5   overlap  divergence (nats)")
        for name, (top1, top5, overlap, divergence) in rows.items():
            print(f"  {name:<20}{top1:8.1%} {top5:8.1%} {overlap:9.2f} {divergence:18.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
