"""Statistics of units: how selective one is, and for which class.

selectivity   lifetime sparseness of a unit's activations by all sounds, see `sparseness`
class         the most frequent class among the top sounds, where sounds have labels
purity        its share among them
enrichment    purity divided by the class's share in the corpus
p             probability of at least so many of that class among as many sounds drawn without
              replacement (hypergeometric, one-sided; not corrected for the number of units)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ClassStatistics(NamedTuple):
    """The class that a unit prefers; None without labels, or for a dead unit."""

    label: str | None = None
    purity: float | None = None
    enrichment: float | None = None
    p: float | None = None


def compute_class_statistics(labels: Sequence[str], class_sizes: Mapping[str, int]) -> ClassStatistics:
    """Compute the statistics of a unit from its top sounds' labels, the strongest sound first.

    Args:
        labels: of the top sounds; of equally frequent classes the first is taken.
        class_sizes: sounds of each class in the corpus.
    """
    if not class_sizes or not labels:
        return ClassStatistics()
    ((label, count),) = Counter(labels).most_common(1)
    total, purity = sum(class_sizes.values()), count / len(labels)
    return ClassStatistics(
        label,
        purity,
        purity / (class_sizes[label] / total),
        hypergeometric_tail(count, len(labels), class_sizes[label], total),
    )


def sparseness(total: NDArray[np.float64], squares: NDArray[np.float64], sounds: int) -> NDArray[np.float64]:
    """Compute the lifetime sparseness of units (Vinje and Gallant, Science 287:1273, 2000).

    S = (1 - (sum r / n)^2 / (sum r^2 / n)) / (1 - 1/n) for activations r by n sounds: 0 if all are equal,
    1 if a single sound activates the unit.

    Args:
        total: sums of each unit's activations.
        squares: sums of their squares.
        sounds: n.

    Shape:
        all `(units,)`; NaN for units that no sound activates, and for n = 1
    """
    if sounds < 2:
        return np.full_like(total, np.nan)
    active_squares = np.where(squares > 0, squares, np.nan)
    values = (1 - np.square(total / sounds) / (active_squares / sounds)) / (1 - 1 / sounds)
    return np.clip(values, 0, 1)  # rounding


def hypergeometric_tail(count: int, drawn: int, class_size: int, total: int) -> float:
    """Return the probability of at least `count` sounds of a class among `drawn` of `total` sounds.

    >>> round(hypergeometric_tail(7, 9, 40, 400), 8)
    1.87e-06
    """
    ways = sum(
        comb(class_size, hits) * comb(total - class_size, drawn - hits)
        for hits in range(count, min(drawn, class_size) + 1)
    )
    return ways / comb(total, drawn)
