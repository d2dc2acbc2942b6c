"""Names of the released networks' outputs: 1000 ImageNet objects and 401 Places scenes."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from soundnet_port.network.architecture import CLASSES


def original_categories(head_sizes: Mapping[str, int]) -> dict[str, list[str]] | None:
    """Return the names of the original's outputs, or None where the heads have other sizes.

    Networks with other heads have other categories, so they never get these names.
    """
    names = {
        "objects": [row["label"] for row in read_category_table("objects")],
        "scenes": [row["category"] for row in read_category_table("scenes")],
    }
    return names if {head: len(labels) for head, labels in names.items()} == dict(head_sizes) else None


def read_category_table(head: str) -> list[dict[str, str]]:
    """Read the rows of `objects.tsv` (index, synset, label) or `scenes.tsv` (index, category)."""
    lines = Path(__file__).with_name(f"{head}.tsv").read_text("utf-8").splitlines()
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def category_name(names: Mapping[str, Sequence[str]], head: str, index: int) -> str:
    """Return the name of an output, or "object 3" (counted from 0) where it has none."""
    return names[head][index] if head in names else f"{singularize(head)} {index}"


def readable_name(name: str) -> str:
    """Return a category's name as people write it; Places lists scenes as paths.

    >>> readable_name("/t/train_station/platform")
    'train station, platform'
    >>> readable_name("hammerhead, hammerhead shark")
    'hammerhead, hammerhead shark'
    """
    if not re.match(r"/[a-z]/.", name):
        return name
    return ", ".join(name.split("/")[2:]).replace("_", " ")


def singularize(head: str) -> str:
    """Return what one output of a head is called: object, scene or class."""
    return head.removesuffix("es") if head == CLASSES else head.removesuffix("s")
