"""Names of the released networks' outputs: 1000 ImageNet objects and 401 Places scenes."""

from __future__ import annotations

import csv
import importlib.resources
import re
from collections.abc import Mapping, Sequence

from soundnet_port.network.architecture import CLASSES


def original_categories(head_sizes: Mapping[str, int]) -> dict[str, list[str]] | None:
    """The names for a network whose heads have the original's sizes, in output order; else None.

    Networks with other heads have other categories, so they never get these names.
    """
    names = {
        "objects": [row["label"] for row in table("objects")],
        "scenes": [row["category"] for row in table("scenes")],
    }
    return names if {head: len(each) for head, each in names.items()} == dict(head_sizes) else None


def table(head: str) -> list[dict[str, str]]:
    """Rows of `objects.tsv` (index, synset, label) or `scenes.tsv` (index, category)."""
    text = importlib.resources.files("soundnet_port.network").joinpath(f"{head}.tsv").read_text("utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


def label(names: Mapping[str, Sequence[str]], head: str, index: int) -> str:
    """Name of an output, or "object 3" (counted from 0, as indices are) where it has none."""
    return names[head][index] if head in names else f"{singular(head)} {index}"


def readable(name: str) -> str:
    """A category's name as people write it; scenes are paths in the list of Places.

    >>> readable("/t/train_station/platform")
    'train station, platform'
    >>> readable("hammerhead, hammerhead shark")
    'hammerhead, hammerhead shark'
    """
    if not re.match(r"/[a-z]/.", name):
        return name
    return ", ".join(name.split("/")[2:]).replace("_", " ")


def singular(head: str) -> str:
    """What an output of a head is called: object, scene or class."""
    return head.removesuffix("es") if head == CLASSES else head.removesuffix("s")
