"""A gallery of hidden units: pages with their top sounds, spectrograms and activations (extra `[plot]`).

A gallery is a folder of plain files; it needs no server and loads nothing from elsewhere:

    index.html, units.js    all units; their data
    conv7/12.html           a unit that is not dead: sounds, spectrograms, activations
    sounds/, pictures/      excerpts, each once, named by a hash of the file's name and the excerpt's position
    sheets/                 small pictures of the index
    units.json              the table; units.parquet on request
    errors.tsv              sounds that could not be used, if any

It is built in OUT.parts/ and moved to OUT when complete. File names may hold anything: they are shown as
escaped text, and never become part of an address.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soundnet_port.corpus.errors import CorpusError, write_failures
from soundnet_port.errors import require
from soundnet_port.files import output_lock
from soundnet_port.learning.labeled_sounds import LabeledSounds
from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.network.model import SoundNet
from soundnet_port.pretrained import load_pretrained
from soundnet_port.progress import ProgressCallback
from soundnet_port.viewing.excerpts import Excerpts, cut_excerpts
from soundnet_port.viewing.gallery_pages import write_pages
from soundnet_port.viewing.spectrograms import get_palette
from soundnet_port.viewing.unit_search import PEAKS_FILE, top_sounds
from soundnet_port.viewing.units import TopSounds


def write_gallery(
    model: SoundNet | str | os.PathLike[str],
    output: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]] = (),
    layers: Sequence[str | int] = (),
    *,
    top: int = 9,
    labels: LabeledSounds | str | os.PathLike[str] | None = None,
    fold: str | None = None,
    edge_frames: bool = False,
    table: bool = False,
    workers: int | None = None,
    decoder: str = "auto",
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> TopSounds:
    """Find the top sounds of units, as `top_sounds` does, and write a gallery of their excerpts.

    A search that was interrupted resumes; excerpts are then cut from the beginning.

    Args:
        model: a SoundNet, or weights as for `load_pretrained`.
        output: the folder to create.
        inputs: as for `top_sounds`, like all arguments not listed here.
        layers: by name, without heads.
        top: sounds per unit, 1 to 32.
        labels: classes of the sounds.
        fold: of the labeled sounds; only these are used.
        edge_frames: count edge frames too, and show them in curves.
        table: also write units.parquet (extra `[parquet]`).
        workers: processes of the search, and threads that cut excerpts; by default one for each CPU.
        decoder: of sound files.
        force: replace a gallery, and discard the results of an interrupted run.
        progress: called during the search (the unit is "file"), then while excerpts are cut ("excerpt").

    Raises:
        CorpusError: as `top_sounds`; the output already exists, or cannot be written.
        MissingExtraError: the extra `[plot]`, or for the table `[parquet]`, is not installed.
    """
    output = Path(output).expanduser()
    get_palette()
    if table:
        require("pyarrow.parquet", "parquet")
    if output.exists():
        _check_replaceable(output, inputs, force)
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    parts = output.with_name(f"{output.name}.parts")
    with output_lock(parts, output, CorpusError) as staging:
        result = top_sounds(
            model,
            inputs,
            layers,
            top=top,
            labels=labels,
            fold=fold,
            edge_frames=edge_frames,
            folder=parts,
            workers=workers,
            decoder=decoder,
            force=force,
            progress=progress,
        )
        if result.sound_count:
            gallery = staging / "gallery"
            try:
                excerpts = cut_excerpts(
                    model, result, gallery, workers=workers, decoder=decoder, progress=progress
                )
                _write_data(gallery, result, excerpts, table)
                write_pages(gallery, result, excerpts)
                if output.exists():
                    output.rename(staging / "replaced")
                gallery.rename(output)
            except OSError as error:
                reason = f"{error.filename or output}: {error.strerror or error}"
                raise CorpusError(f"{reason}; run the same command again to resume") from None
        for name in (PEAKS_FILE, f"{PEAKS_FILE}.json", f"{PEAKS_FILE}.errors.tsv"):
            (parts / name).unlink(missing_ok=True)
    return result


def _check_replaceable(output: Path, inputs: Sequence[str | os.PathLike[str]], force: bool) -> None:
    """Check that an existing output is to be replaced, is a gallery or empty, and no part of the inputs."""
    if not force:
        raise CorpusError(f"{output}: already exists; use --force to replace a gallery")
    is_gallery = output.is_dir() and ((output / "gallery.css").is_file() or not any(output.iterdir()))
    if not is_gallery:
        raise CorpusError(f"{output}: already exists and is not a gallery; choose another folder")
    for folder in filter(os.path.isdir, inputs):
        if output.resolve().is_relative_to(Path(folder).resolve()):
            raise CorpusError(f"{output}: its excerpts would be inputs, as part of {folder}; remove it first")


def _write_data(folder: Path, result: TopSounds, excerpts: Excerpts, table: bool) -> None:
    content = result.to_dict()
    sounds = ((unit, sound) for unit in result.units for sound in unit.sounds)
    for row, (unit, sound) in zip(content["rows"], sounds, strict=True):
        excerpt = excerpts[sound.path, unit.layer, sound.frame]
        row["excerpt"], row["excerpt_start"] = excerpt.sound, excerpt.start / SAMPLE_RATE
    (folder / "units.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    if table:
        _write_table(folder / "units.parquet", content["rows"])
    if result.failures:
        write_failures(folder / "errors.tsv", result.failures)


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    numbers = ("activation", "start", "peak", "end", "selectivity", "purity", "excerpt_start")
    types = dict.fromkeys(numbers, pyarrow.float64()) | dict.fromkeys(("unit", "rank"), pyarrow.int64())
    names = (
        "layer unit rank activation path start peak end label selectivity name purity excerpt excerpt_start"
    )
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in names.split()])
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema), path)
