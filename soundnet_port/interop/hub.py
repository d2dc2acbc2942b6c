"""SoundNet on the Hugging Face Hub, through huggingface_hub's mixin (extra `[hub]`).

A saved folder has `model.safetensors`, a weights file that `load_pretrained` reads without huggingface_hub;
`config.json`; and `README.md`, the model card. Weights are read from safetensors only, never from a pickle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from soundnet_port.errors import MissingExtraError
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE, SOUNDNET8, Architecture
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import (
    IN_FOLDER,
    checksum,
    cpu_state_dict,
    read_weights,
    write_weights,
)
from soundnet_port.pretrained import locate_weights
from soundnet_port.version import __version__

try:
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
except ImportError:  # needed now, for a base class
    raise MissingExtraError("huggingface_hub", "hub") from None

_MAX_NAMES = 8  # of a head, on the card

_CARD = """---
{data}
---

# {title}

SoundNet (Y. Aytar, C. Vondrick, A. Torralba, *SoundNet: Learning Sound Representations from Unlabeled Video*,
NIPS 2016, [arXiv:1610.09001](https://arxiv.org/abs/1610.09001)), for
soundnet-port. It takes a raw waveform at 22,050 Hz, within +-256, and gives the activations of any
layer{heads}.

| | |
|---|---|
{rows}

## Use

```python
import soundnet_port as sp
from soundnet_port.interop.hub import HubSoundNet

model = HubSoundNet.from_pretrained("OWNER/REPOSITORY")  # this repository
features = model.extract(sp.load_audio("sound.wav"), ["{layer}"])
{predict}```

`sp.load_pretrained("FOLDER")` reads a folder with these files without huggingface_hub. `model.safetensors`
holds tensors and JSON metadata, no code; its checksum is verified at every load.
"""


class HubSoundNet(SoundNet, ModelHubMixin):  # type: ignore[misc]
    """A `SoundNet` that can be saved to and loaded from the Hugging Face Hub.

    `save_pretrained(folder)`, `push_to_hub("owner/repository")` and `from_pretrained` (a name on the hub, or
    a folder) are the mixin's, with its options. `from_weights` loads weights to publish.

    Attributes:
        metadata: of the weights, as `read_metadata` returns it; saved only as far as it is still true of the
            tensors. Set `metadata["license"]` to an SPDX identifier such as `"mit"` before publishing weights
            without one.
    """

    def __init__(
        self,
        architecture: Architecture = SOUNDNET8,
        categories: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(architecture, categories)
        self.metadata: dict[str, Any] = {}
        self._hub_mixin_config = {
            "model_type": architecture.name,
            "widths": list(architecture.widths),
            "heads": architecture.head_sizes,
            "sample_rate": SAMPLE_RATE,
            "full_scale": FULL_SCALE,
        }

    @classmethod
    def from_weights(cls, name_or_path: str | os.PathLike[str]) -> HubSoundNet:
        """Load the network of a weights file, in eval mode and frozen, with the file's metadata.

        Args:
            name_or_path: as for `load_pretrained`.

        Raises:
            WeightsError: as `load_pretrained`.
        """
        architecture, state, metadata = read_weights(locate_weights(name_or_path))
        with torch.device("meta"):
            model = cls(architecture, metadata["categories"])
        model.load_state_dict(state, assign=True)
        model.metadata = metadata
        return model.eval().requires_grad_(False)

    def generate_model_card(self, **_: Any) -> ModelCard:
        """Return the model card of a saved folder: architecture, origin, license, usage."""
        metadata, architecture = self._valid_metadata(), self.architecture
        data = ModelCardData(
            library_name="soundnet-port",
            license=metadata.get("license"),
            pipeline_tag="audio-classification" if architecture.heads else "feature-extraction",
            tags=["audio", "model_hub_mixin", "sound", "soundnet"],
        )
        count = sum(parameter.numel() for parameter in self.parameters())
        rows = {
            "architecture": f"{architecture.name}, {count:,} parameters, "
            f"blocks of {', '.join(map(str, architecture.widths))} channels",
            "source": _describe_source(metadata),
            "license": metadata.get("license") or "not stated",
        }
        for head, size in architecture.head_sizes.items():
            names = self.categories.get(head, ())
            examples = "; ".join([*names[:_MAX_NAMES], *(["..."] if len(names) > _MAX_NAMES else [])])
            rows[head] = f"{size:,}: {examples}" if names else f"{size:,}, without names"
        heads = " and ".join(architecture.head_sizes)
        content = _CARD.format(
            data=data.to_yaml(),
            title=f"SoundNet ({architecture.name})",
            heads=f", and logits of {heads} over time" if heads else "",
            rows="\n".join(f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()),
            layer=architecture.last_layer,
            predict='print(sp.predict(model, "sound.wav"))\n' if heads else "",
        )
        return ModelCard(content)

    def _valid_metadata(self) -> dict[str, Any]:
        """Return the metadata; if the tensors have changed, only what does not depend on them."""
        if checksum(cpu_state_dict(self, torch.float32)) == self.metadata.get("sha256"):
            return self.metadata
        return {"license": self.metadata.get("license"), "converter": __version__}

    def _save_pretrained(self, save_directory: Path) -> None:
        categories = {head: list(names) for head, names in self.categories.items()} or None
        metadata = self._valid_metadata() | {"categories": categories}
        write_weights(
            save_directory / IN_FOLDER, self.architecture, cpu_state_dict(self, torch.float32), metadata
        )

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> HubSoundNet:
        if Path(model_id).is_dir():
            return cls.from_weights(Path(model_id, IN_FOLDER))
        return cls.from_weights(hf_hub_download(model_id, IN_FOLDER, **options))


def _describe_source(metadata: Mapping[str, Any]) -> str:
    """Describe where the weights come from, in a sentence or two."""
    training, source = metadata.get("training") or {}, metadata.get("source") or {}
    if training:
        start = training.get("start") or "random values"
        origin = start if start == "random values" else f"weights with sha256 {start}"
        data = "labeled sounds" if "tuning" in training else "teachers' probabilities"
        text = f"trained on {data} with soundnet-port {metadata['converter']}, starting from {origin}"
    elif source:
        text = (
            f"converted by soundnet-port {metadata['converter']} from a file of {source.get('bytes')} bytes, "
            f"sha256 {source.get('sha256')}"
        )
        if "worst" in metadata["parity"]:
            worst = metadata["parity"]["worst"]
            text += f"; compared with its own graph, worst difference {worst} of a layer's largest value"
    else:
        text = "not recorded"
    if metadata.get("released"):
        text += f". Compared with the network that the authors released: {metadata['recognition']}"
    return text
