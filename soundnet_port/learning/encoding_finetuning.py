"""Fine-tune an encoding model: the blocks below a layer, and a linear head from it to recorded targets.

The head starts as encode's ridge regression, fitted to the training runs; then head and blocks are trained
together by gradient descent on the same targets. The epoch with the least error in runs that are held out for
that is kept, the ridge solution among them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from soundnet_port.files import exclusive_lock, stream_sha256
from soundnet_port.learning.devices import create_fabric
from soundnet_port.learning.encoding_data import (
    MOST_FOLDS,
    Recording,
    assign_folds,
    group_recordings,
    list_recordings,
)
from soundnet_port.learning.encoding_features import check_decoder, create_response
from soundnet_port.learning.encoding_finetune_loop import EncodingLoop
from soundnet_port.learning.encoding_finetune_run import (
    TEST,
    TRAIN,
    VALIDATION,
    EncodingRun,
    FinetuneEncodingConfig,
    FinetuneEncodingResult,
)
from soundnet_port.learning.encoding_results import ENCODING
from soundnet_port.learning.errors import EncodingError, TrainingError
from soundnet_port.learning.labeled_sounds import natural_sort_key, summarize_names
from soundnet_port.learning.ridge import check_alphas
from soundnet_port.learning.run_files import CHECKPOINT
from soundnet_port.network.architecture import ARCHITECTURES, Architecture
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import build_model, checksum, cpu_state_dict
from soundnet_port.pretrained import load_pretrained
from soundnet_port.progress import ProgressCallback

_TRAINED_BLOCKS = 2  # by default
_ALL = "none"  # is frozen
_LISTED_RUNS = 10  # in a message; of more, the first ones


def finetune_encoding(
    recordings: Sequence[Recording] | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    tr: float,
    weights: SoundNet | str | os.PathLike[str] = "soundnet8",
    layer: str | None = None,
    frozen: str | None = None,
    test: str | int | None = None,
    validation: str | int | None = None,
    delays: Sequence[int] | None = None,
    hrf: str | None = None,
    align: str = "center",
    alphas: Sequence[float] | None = None,
    edge_frames: bool = False,
    config: FinetuneEncodingConfig | None = None,
    device: str = "auto",
    precision: str = "32-true",
    decoder: str = "auto",
    progress: ProgressCallback | None = None,
) -> FinetuneEncodingResult:
    """Train a network and a linear head to predict recorded targets, or resume an interrupted run.

    Writes to the folder `weights.safetensors` (the trunk, without heads), `head.npz`, `result.json`,
    `finetuned_correlation.npy`, `finetuned_r2.npy`, `ridge_correlation.npy`, `ridge_r2.npy`, `log.csv` and
    `curves.png`. Until it is done there is `checkpoint.pt`, from which the same call resumes. A run that is
    done is only read.

    Args:
        recordings: the recordings, or a table that `read_recordings` reads.
        folder: of the run.
        tr: seconds from one row of targets to the next: fMRI's repetition time.
        weights: initial weights: a network, or its name or file.
        layer: that the head is on; by default the network's default layer, pool5 (conv4 with 5 layers). Later
            layers stay as they are.
        frozen: the layer up to which nothing changes; by default two blocks are trained. "none" trains all.
            Batch norms never change.
        test: a run to hold out and measure on, with the runs that share its stimulus. It chooses nothing.
        validation: a run to hold out for choosing the epoch, and for early stopping, with the runs that share
            its stimulus; by default the last run that is not held out for the test.
        delays: as for `fit_encoding_models`.
        hrf: as for `fit_encoding_models`.
        align: as for `fit_encoding_models`.
        alphas: as for `fit_encoding_models`.
        edge_frames: include edge frames (see `SoundNet.edge_frames`).
        config: hyperparameters; by default `FinetuneEncodingConfig()`.
        device: "cpu", "cuda", "cuda:1", "mps", or "auto" for the best one available.
        precision: "32-true", "bf16-mixed" or "16-mixed".
        decoder: of sound files, see `load_audio`.
        progress: called after each sound, then with each caveat as a message, after each penalty of the
            ridge, and after every epoch with an `EpochProgress`.

    Raises:
        EncodingError: the recordings, a sound or a setting cannot be used.
        TrainingError: a folder with another run or with another process at work, or with results of `encode`;
            settings that cannot work.
        WeightsError: no such weights.
        MissingExtraError: the extra `[learn]` is not installed, or for HDF5 files `[hdf5]`.
    """
    config = config or FinetuneEncodingConfig()
    tr, edge_frames = float(tr), bool(edge_frames)  # NumPy's cannot be saved as JSON
    response = create_response(tr, delays, hrf)
    penalties = check_alphas(alphas)
    check_decoder(decoder)
    if align not in ("center", "end"):
        raise EncodingError(f"unknown align {align!r}; choose from center, end")
    listed = [replace(own, sound=Path(own.sound), run=str(own.run)) for own in list_recordings(recordings)]
    test, validation = (None if name is None else str(name) for name in (test, validation))
    parts, folds = _split(listed, test, validation)
    source = weights if isinstance(weights, SoundNet) else load_pretrained(weights)
    complete, model = _build_models(source, layer)
    frozen_blocks = _count_frozen(model.architecture, frozen)
    settings = {
        "kind": "encoding model",
        "architecture": model.architecture.name,
        "widths": list(complete.architecture.widths),
        "layer": model.architecture.last_layer,
        "frozen": model.architecture.blocks[frozen_blocks - 1].output if frozen_blocks else None,
        "start": checksum(cpu_state_dict(complete, torch.float32)),
        "tr": tr,
        **response.describe(hrf),
        "align": align,
        "edge_frames": edge_frames,
        "alphas": list(penalties),
        "tuning": asdict(config),
        "test": test,
        "validation": validation,
        "precision": precision,
        "decoder": decoder,
        "recordings": _hash_recordings(listed),
    }
    run = EncodingRun(
        folder=Path(folder),
        recordings=listed,
        parts=parts,
        folds=folds,
        model=model,
        complete=complete,
        frozen_blocks=frozen_blocks,
        response=response,
        tr=tr,
        align=align,
        edge_frames=edge_frames,
        alphas=penalties,
        decoder=decoder,
        config=config,
        settings=json.loads(json.dumps(settings)),  # as reading them gives them
    )
    if run.folder.exists() and not run.folder.is_dir():
        raise TrainingError(f"{folder}: is a file, not a folder; choose another name")
    if (result := run.read_result()) is not None:
        return result
    if (run.folder / ENCODING).exists() and not (run.folder / CHECKPOINT).exists():
        raise TrainingError(f"{folder}: holds results of encode; choose another folder")
    fabric = create_fabric(device, precision=precision)
    is_new = not run.folder.exists()
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_lock(run.folder, TrainingError):  # another process may have finished it since
            if (result := run.read_result()) is not None:
                return result
            return EncodingLoop(run, fabric, progress).train()
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # unless it is empty
                run.folder.rmdir()
        raise


def _split(
    recordings: Sequence[Recording], test: str | None, validation: str | None
) -> tuple[list[str], list[int]]:
    """Return the part of each recording, and folds of those in training.

    Raises:
        EncodingError: no such run, or too few.
    """
    groups = group_recordings(recordings)
    group_of = {recording.run: group for recording, group in zip(recordings, groups, strict=True)}
    for role, name in ((TEST, test), (VALIDATION, validation)):
        if name is not None and name not in group_of:
            names = sorted(group_of, key=natural_sort_key)
            choices = ", ".join(names) if len(names) <= _LISTED_RUNS else summarize_names(names)
            raise EncodingError(f"{role}: no run {name!r}; choose from {choices}")
    held_out = {} if test is None else {group_of[test]: TEST}
    rest = [group for group in groups if group not in held_out]
    if validation is not None and group_of[validation] in held_out:
        raise EncodingError(
            f"validation: run {validation!r} is the test run, or shares its stimulus; choose another one"
        )
    if len(set(rest)) < 2:
        count = len(set(groups))
        raise EncodingError(
            f"recordings: {count} independent run{'s' * (count != 1)}; {3 if held_out else 2} are needed, "
            f"one for training, one for validation{' and one for the test' if held_out else ''}"
        )
    held_out[rest[-1] if validation is None else group_of[validation]] = VALIDATION
    parts = [held_out.get(group, TRAIN) for group in groups]
    members = [index for index, part in enumerate(parts) if part == TRAIN]
    folds = [0] * len(recordings)
    if len({groups[index] for index in members}) > 1:
        own, _ = assign_folds([recordings[index] for index in members], MOST_FOLDS)
        for index, fold in zip(members, own, strict=True):
            folds[index] = fold
    return parts, folds


def _build_models(source: SoundNet, layer: str | None) -> tuple[SoundNet, SoundNet]:
    """Return copies of a network: without heads; and cut off after a layer.

    Raises:
        TrainingError: no such layer, or a trunk that is cut off already.
    """
    full = source.architecture
    count = len(ARCHITECTURES[full.name].blocks)
    if len(full.blocks) != count:
        raise TrainingError(
            f"weights: a trunk of {len(full.blocks)} blocks, fine-tuned to classes; start from one of {count}"
        )
    architecture = full.resized(full.widths, {})
    trunk = [own.name for own in architecture.layers.values()]
    chosen = full.default_layer if layer is None else layer
    if chosen not in trunk:
        raise TrainingError(f"layer: no {chosen!r} in the trunk; choose from {', '.join(trunk)}")
    cut = replace(architecture.with_classes(1, chosen), heads=())
    state = cpu_state_dict(source, torch.float32)
    complete, model = (
        build_model(own, {name: state[name].clone() for name in own.state_shapes()})
        for own in (architecture, cut)
    )
    return complete, model


def _count_frozen(architecture: Architecture, frozen: str | None) -> int:
    """Return the number of blocks that stay as they are.

    Raises:
        TrainingError: no such layer, or nothing is left to train.
    """
    ends = [block.output for block in architecture.blocks]
    names = [block.name for block in architecture.blocks]
    if frozen is None:
        return max(0, len(ends) - _TRAINED_BLOCKS)
    if frozen == _ALL:
        return 0
    if frozen not in [*ends[:-1], *names[:-1]]:
        choices = ", ".join([*ends[:-1], _ALL])
        raise TrainingError(f"frozen: {frozen!r} is no layer below {ends[-1]}; choose from {choices}")
    return (ends if frozen in ends else names).index(frozen) + 1


def _hash_recordings(recordings: Sequence[Recording]) -> str:
    """Return the sha256 of sounds, runs, stimuli, onsets and targets, wherever they are stored.

    Raises:
        EncodingError: a sound cannot be read.
    """
    digest = hashlib.sha256()
    sounds: dict[Path, str] = {}
    for own in recordings:
        if own.sound not in sounds:
            try:
                with open(own.sound, "rb") as file:
                    sounds[own.sound] = stream_sha256(file)
            except OSError as error:
                raise EncodingError(f"{own.sound}: {error.strerror or error}") from None
        line = (
            f"{own.sound.name}\t{sounds[own.sound]}\t{own.run}\t{own.stimulus}\t{float(own.onset)}\t"
            f"{own.targets.shape}\n"
        )
        digest.update(line.encode("utf-8", "surrogateescape"))
        digest.update(np.ascontiguousarray(own.targets, np.float32).tobytes())
    return digest.hexdigest()
