"""Settings of a run: checked, resolved, recorded, and compared with those of earlier results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from soundnet_port.audio.loading import DECODERS
from soundnet_port.corpus.errors import CorpusError
from soundnet_port.corpus.features import OutputSpec, result_key
from soundnet_port.corpus.formats import FORMATS, infer_format
from soundnet_port.inference.alignment import check_clock
from soundnet_port.inference.pooling import POOLINGS, count_statistics
from soundnet_port.network.architecture import SAMPLE_RATE, Architecture, Layer
from soundnet_port.network.engine import BLOCK, kernel_name
from soundnet_port.network.kernels.library import VARIABLE
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict
from soundnet_port.pretrained import load_pretrained
from soundnet_port.version import __version__


def resolve_output(output: str | os.PathLike[str], format_name: str | None) -> tuple[Path, str, bool]:
    """Return the output's path, the name of its format, and whether it is a single file.

    Raises:
        CorpusError: an unknown format, or one that the output cannot have.
    """
    is_folder = os.fspath(output).endswith(("/", os.sep))
    output = Path(output).expanduser()
    suffix_format = None if is_folder or output.is_dir() else infer_format(output.name)
    if not (is_folder or suffix_format or format_name or output.exists()) and output.suffix:
        suffixes = ", ".join(f".{name}" for name in FORMATS if FORMATS[name].merge)
        raise CorpusError(
            f"{output}: no format has this suffix; use {suffixes}, or name a folder with a slash at its end"
        )
    name = format_name or suffix_format or "npz"
    _check_choice("format", name, tuple(FORMATS))
    if suffix_format and (name != suffix_format or not FORMATS[name].merge):
        raise CorpusError(
            f"{output}: cannot hold a corpus as {name}; name a folder, or another format's file"
        )
    if output.exists() and not suffix_format and not output.is_dir():
        raise CorpusError(f"{output}: neither a folder nor a file of a known format")
    return output, name, suffix_format is not None


def check_settings(
    format_name: str, pool: str, decoder: str, workers: int | None, batch_seconds: float | None
) -> int:
    """Return how many samples are computed at once.

    Raises:
        CorpusError: settings that cannot work.
        MissingExtraError: the format's package is not installed.
    """
    _check_choice("pooling", pool, ("none", *POOLINGS))
    _check_choice("decoder", decoder, DECODERS)
    if workers is not None and workers < 1:
        raise CorpusError(f"the number of workers must be at least 1, not {workers}")
    if batch_seconds is not None and not 1 <= batch_seconds <= 3600:
        raise CorpusError(f"batch seconds must be 1 to 3600, not {batch_seconds:g}")
    FORMATS[format_name].check_package()
    return BLOCK if batch_seconds is None else round(batch_seconds * SAMPLE_RATE)


def _check_choice(kind: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise CorpusError(f"unknown {kind} {value!r}; choose from {', '.join(choices)}")


def resolve_model(
    model: SoundNet | str | os.PathLike[str],
    layers: Sequence[str | int] | None = None,
    *,
    format_name: str = "npz",
    pool: str = "none",
    decoder: str = "auto",
    block: int = BLOCK,
    tr: float | None = None,
    align: str = "center",
    edge_frames: bool = False,
) -> tuple[SoundNet, OutputSpec]:
    """Load the network if need be, and specify what the files will contain.

    Args:
        model: a SoundNet, or weights as for `load_pretrained`.
        layers: names or module numbers; by default the architecture's default layer.
        format_name: a key of `FORMATS`.
        pool: "none", one of `POOLINGS`, or "peak" for the search of top sounds.
        decoder: of sound files.
        block: samples computed at once.
        tr: period of rows on a clock, in seconds; by default rows are the network's frames.
        align: of such rows, "center" or "end".
        edge_frames: whether edge frames are pooled, or averaged on a clock.

    Raises:
        CorpusError: an unknown layer, or settings that do not go together.
        WeightsError: no such weights.
    """
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    keys = (model.architecture.default_layer,) if layers is None else layers
    resolved = _resolve_layers(model.architecture, keys, format_name)
    spec = _build_spec(model, resolved, pool, decoder, block)
    if tr is not None:
        spec = _with_clock(spec, resolved, format_name, tr, align)
    if spec.edge_layers and not spec.all_frames:
        metadata = {**spec.metadata, "edge_frames": edge_frames}
        spec = replace(spec, metadata=metadata, edge_frames=edge_frames)
    return model, replace(spec, layers=tuple(keys))


def resolve_layer(architecture: Architecture, key: str | int) -> Layer:
    """Return a layer by name or module number; raise a CorpusError if there is none."""
    try:
        return architecture.layer(key)
    except ValueError as error:
        raise CorpusError(f"layers: {error}") from None


def _resolve_layers(
    architecture: Architecture, keys: Sequence[str | int], format_name: str
) -> dict[str, Layer]:
    """Return the layers by their names in results."""
    if isinstance(keys, (str, int)) or not keys:
        raise CorpusError(f"layers must be a list, such as ['pool5'], not {keys!r}")
    layers = {}
    for key in keys:
        layer = resolve_layer(architecture, key)
        if format_name == "torch7" and layer.kind == "head":
            raise CorpusError("torch7 holds modules of the trunk; for the heads choose another format")
        layers[result_key(key)] = layer
    return layers


def _build_spec(
    model: SoundNet, layers: Mapping[str, Layer], pool: str, decoder: str, block: int
) -> OutputSpec:
    parameter = next(model.parameters())
    return OutputSpec(
        {key: layer.channels * count_statistics(pool) for key, layer in layers.items()},
        pool,
        {
            "version": __version__,
            "architecture": model.architecture.name,
            "weights": checksum(cpu_state_dict(model)),
            "layers": list(layers),
            "modules": {key: layer.module for key, layer in layers.items()},
            "pool": pool,
            "axes": "frames, channels" if pool == "none" else "channels",
            "sample_rate": SAMPLE_RATE,
            "decoder": decoder,
            "device": parameter.device.type,
            "dtype": str(parameter.dtype).removeprefix("torch."),  # the network's; features are float32
            "batch_seconds": round(block / SAMPLE_RATE, 3),
            "kernel": kernel_name(parameter),  # of another kind, results differ in their last digits
        },
        edge_layers=tuple(key for key, layer in layers.items() if model.architecture.has_edge_frames(layer)),
    )


def _with_clock(
    spec: OutputSpec, layers: Mapping[str, Layer], format_name: str, tr: float, align: str
) -> OutputSpec:
    """Return the specification of rows on a clock instead of the network's frames."""
    try:
        check_clock(tr, align)
    except ValueError as error:
        raise CorpusError(str(error)) from None
    if spec.pool != "none":
        raise CorpusError("rows on a clock are means over time already; leave the pooling out")
    if format_name == "torch7":
        raise CorpusError("torch7 holds the network's own frames; for rows on a clock choose another format")
    metadata = {
        "axes": "periods, channels",
        "tr": tr,
        "align": align,
        "receptive_field_seconds": {
            key: round(layer.receptive_field / SAMPLE_RATE, 6) for key, layer in layers.items()
        },
    }
    return replace(spec, metadata={**spec.metadata, **metadata}, clock=(tr, align))


# ---- records of settings, beside the results


def serialize_record(settings: Mapping[str, Any]) -> str:
    """Return settings as the text of a record."""
    return json.dumps(dict(settings), indent=2, sort_keys=True) + "\n"


def parse_record(content: bytes, path: object) -> dict[str, Any]:
    """Return the settings in a record; raise a CorpusError if it is damaged."""
    try:
        record = json.loads(content)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise CorpusError(
            f"{path}: damaged; it should record the settings of the results. Remove it, then use --force"
        )
    return record


def check_record(record: Mapping[str, Any], settings: Mapping[str, Any], location: object) -> None:
    """Raise a CorpusError if results have other settings."""
    differences = describe_differences(record, settings)
    if differences:
        remedy = "choose another output, or start over with --force"
        kernel = record.get("kernel", "engine")
        if len(differences) == 1 and kernel != settings.get("kernel", "engine"):
            remedy += f", or set {VARIABLE}={kernel} to continue"
        raise CorpusError(f"{location}: made with other settings ({'; '.join(differences)}); {remedy}")


def describe_differences(record: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ, such as "pool: none before, mean now"."""

    def text(value: object) -> str:
        if value is None:
            return "none"
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    defaults = {"kernel": "engine"}  # records of versions without kernels
    record, settings = {**defaults, **record}, {**defaults, **settings}
    return [
        f"{key.replace('_', ' ')}: {text(record.get(key))} before, {text(settings.get(key))} now"
        for key in {**settings, **record}
        if key not in ("version", "modules", "axes") and record.get(key) != settings.get(key)
    ]
