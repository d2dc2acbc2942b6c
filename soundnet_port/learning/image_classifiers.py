"""Load image classifiers as teachers, and compute their probabilities."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.corpus.errors import CorpusError
from soundnet_port.errors import require
from soundnet_port.learning.pseudo_labels import HEADS, get_head
from soundnet_port.network.weights import checksum

if TYPE_CHECKING:
    from PIL import Image

Teachers = Mapping[str, str | os.PathLike[str] | Sequence[str | os.PathLike[str]]]

# Short forms of transformers' messages
_REASONS = {
    "Unrecognized configuration class": "it is another kind of model",
    "trust_remote_code": "it needs code that comes with it, which is never run",
    "Repo id must be": "no such folder, and not a name on the Hugging Face hub",
    "couldn't connect": "not in the cache, and the Hugging Face hub cannot be reached",
    "model.safetensors": "it has no model.safetensors, and pickled weights are never read",
    "preprocessor_config.json": "it has no preprocessor_config.json",
}


@dataclass(frozen=True)
class ImageClassifier:
    """An image classifier with its preprocessing.

    Attributes:
        column: of the manifest: the head, or for a further teacher of it "head:model".
        source: the model's name or folder.
        categories: names, in the order of the probabilities.
        sha256: of its parameters and settings.
        model: of `transformers`.
        processor: of `transformers`.
    """

    column: str
    source: str
    categories: list[str]
    sha256: str
    model: Any
    processor: Any

    @property
    def head(self) -> str:
        """The head that it teaches."""
        return get_head(self.column)

    def preprocess(self, image: Image.Image) -> dict[str, torch.Tensor]:
        """Return the model's inputs for an image, with a batch dimension of 1."""
        inputs = self.processor(images=image, return_tensors="pt")
        return {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}

    def classify(self, images: Sequence[Mapping[str, torch.Tensor]]) -> NDArray[np.float32]:
        """Compute probabilities (images, categories) of preprocessed images of the same shape.

        Raises:
            CorpusError: the model's output is not one.
        """
        device = self.model.device
        with torch.inference_mode():
            inputs = {name: torch.cat([image[name] for image in images]).to(device) for name in images[0]}
            rows: NDArray[np.float32] = self.model(**inputs).logits.float().softmax(-1).cpu().numpy()
        if rows.shape != (len(images), len(self.categories)) or not np.isfinite(rows).all():
            raise CorpusError(
                f"{self.source}: outputs {'x'.join(map(str, rows.shape))} numbers or NaN, not probabilities "
                f"of {len(self.categories)} categories for {len(images)} frames; choose another model"
            )
        return rows


def load_classifiers(teachers: Teachers, device: torch.device) -> list[ImageClassifier]:
    """Load the teachers of each head, and check that those of a head have the same categories.

    Raises:
        CorpusError: an unknown head, a model that cannot be loaded or is no image classifier.
    """
    if not teachers:
        raise CorpusError("no teachers; name one such as objects=microsoft/resnet-50")
    classifiers: dict[str, ImageClassifier] = {}
    for head, sources in teachers.items():
        if head not in HEADS:
            raise CorpusError(f"unknown head {head!r}; choose from {', '.join(HEADS)}")
        for source in [sources] if isinstance(sources, (str, os.PathLike)) else sources:
            text = os.fspath(source)
            column = head
            if head in classifiers:
                column = f"{head}:" + re.sub(r"[^\w.-]", "_", Path(text).name)
            if column in classifiers:
                raise CorpusError(f"{text}: two teachers would be called {column}; rename a folder")
            classifiers[column] = load_classifier(column, text, device)
            _check_categories(classifiers[head], classifiers[column])
    return list(classifiers.values())


def load_classifier(column: str, source: str, device: torch.device) -> ImageClassifier:
    """Load an image classifier of the Hugging Face hub, or of a folder; no code that comes with it is run.

    Raises:
        CorpusError: it cannot be loaded, is no image classifier, or the device does not exist.
        MissingExtraError: the extra `[videos]` is not installed.
    """
    transformers = require("transformers", "videos")
    from safetensors import SafetensorError

    try:
        model, loading = transformers.AutoModelForImageClassification.from_pretrained(
            source, trust_remote_code=False, use_safetensors=True, output_loading_info=True
        )
        # always PIL: torchvision, where it is installed, resizes a little differently
        processor = transformers.AutoImageProcessor.from_pretrained(
            source, trust_remote_code=False, backend="pil"
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        reason = next((short for part, short in _REASONS.items() if part in text), text)
        raise CorpusError(f"{source}: cannot be loaded as an image classifier: {reason}") from None
    if loading["missing_keys"]:  # transformers would continue with random values
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise CorpusError(f"{source}: not an image classifier: missing parameters {missing}")
    config = model.config
    if config.problem_type == "multi_label_classification":
        raise CorpusError(f"{source}: its categories are not exclusive, so it outputs no distribution")
    categories = [str(config.id2label.get(i, f"LABEL_{i}")) for i in range(config.num_labels)]
    model = model.float().eval()
    digest = hashlib.sha256(checksum(model.state_dict()).encode())
    digest.update(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:  # torch, for a device that does not exist
        raise CorpusError(f"device {device}: {str(error).splitlines()[0]}") from None
    return ImageClassifier(column, source, categories, digest.hexdigest(), model, processor)


def _check_categories(first: ImageClassifier, second: ImageClassifier) -> None:
    """Check that teachers of a head have the same categories in order; a few may be spelled differently."""
    shared = set(first.categories) & set(second.categories)
    if len(first.categories) != len(second.categories) or any(
        a != b and {a, b} <= shared for a, b in zip(first.categories, second.categories, strict=True)
    ):
        raise CorpusError(
            f"{first.source} and {second.source} cannot both teach {first.head}: "
            "their categories differ in number or order"
        )
