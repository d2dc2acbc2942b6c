"""Make training data from sounds: a trained SoundNet is the teacher of another one.

The teacher hears what the student will hear, examples of 20 s (see `fit_example`): a shorter sound is
repeated. Its heads then have four frames, none of them an edge frame, as many as an example has label steps;
a step's label is the mean over its frames of their probabilities. The output is a folder of pseudo-labels,
see `soundnet_port.learning.label_folder`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from soundnet_port.audio.finding import Failure
from soundnet_port.audio.loading import read_blocks
from soundnet_port.corpus.errors import CorpusError, describe_error, format_write_error
from soundnet_port.corpus.run import CorpusResult, RunStatus
from soundnet_port.files import exclusive_lock
from soundnet_port.learning.distillation_examples import EXAMPLE_STEPS, STEP_SAMPLES, fit_example
from soundnet_port.learning.label_folder import ERRORS, MANIFEST, LabelFolder, find_sources
from soundnet_port.learning.pseudo_labels import HEADS, Labels
from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.network.evaluation_mode import check_is_model, evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict
from soundnet_port.progress import ProgressCallback


def label_sounds(
    model: SoundNet,
    sounds: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    name: str = "SoundNet",
    root: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> CorpusResult:
    """Make training data for `train` from sounds, with a trained network as the teacher.

    Results of earlier runs stay, and sounds that have results are not read again.

    Args:
        model: the teacher, with heads for objects and scenes; it is used in evaluation mode.
        sounds: as on the command line: files, folders to be searched, "@LIST" for a text file with a
            path per line.
        output: a folder; the manifest for training is `manifest.tsv` there.
        name: of the teacher, for messages.
        root: a folder that the names of results are relative to; by default each folder searched.
        progress: called after every sound, with a message if it failed.

    Returns:
        counts, failures, and the manifest as its output

    Raises:
        CorpusError: a network without these heads, labels of another teacher in the folder, another run at
            work there, two sounds with the same name, or results that cannot be written.
    """
    check_is_model(model)
    if set(model.architecture.head_sizes) != set(HEADS):
        raise CorpusError(f"{name}: no heads objects and scenes; a teacher needs both")
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder}: is a file; name a folder for the results")
    sources, failures = find_sources([sounds] if isinstance(sounds, (str, os.PathLike)) else sounds, root)
    record = {"model": name, "sha256": checksum(cpu_state_dict(model, torch.float32))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(folder, CorpusError):
            labels = LabelFolder(folder, dict.fromkeys(HEADS, record))
            paths = labels.manifest_paths(sources, failures)
            sources = [source for source in sources if source.name in paths]
            status = RunStatus(len(sources) + len(failures), failures, progress)
            status.failed = len(failures)
            labels.write_teachers(model.categories)
            try:
                for source in sources:
                    if all(labels.is_labeled(head, source.name) for head in HEADS):
                        status.already_done += 1
                        continue
                    try:
                        rows, seconds = label_sound(model, source.path)
                    except (ValueError, RuntimeError) as error:
                        status.add_failure(Failure(source.path, describe_error(error, source.path)))
                        continue
                    for head, values in rows.items():
                        labels.write_labels(head, source.name, values)
                    status.extracted += 1
                    status.seconds += seconds
                    status.report()
            finally:  # when interrupted, too
                labels.write_manifest(paths, list(status.failures.values()))
    except OSError as error:
        raise CorpusError(format_write_error(error.filename or folder, error)) from None
    return status.result(folder / MANIFEST, folder / ERRORS)


def label_sound(model: SoundNet, path: str | os.PathLike[str]) -> tuple[Labels, float]:
    """Compute a network's distributions for each 5 s of a sound file, 20 s at a time.

    A rest of less than 2.5 s at the end gives no step, unless it is the whole sound.

    Shape:
        returns (steps, categories) by head, float32; and the sound's seconds

    Raises:
        AudioError: the file cannot be used.
    """
    device = next(model.parameters()).device
    rows: dict[str, list[NDArray[np.float32]]] = {head: [] for head in model.architecture.head_sizes}
    samples = 0
    for window in read_blocks(path, samples=EXAMPLE_STEPS * STEP_SAMPLES):
        steps = (len(window) + STEP_SAMPLES // 2) // STEP_SAMPLES or (not samples)
        samples += len(window)
        if not steps:
            break
        example, frame_steps = fit_example(window, {"step": torch.arange(steps)[:, None]})
        with evaluation_mode(model):
            logits = model(example.to(device))._asdict()
        for head, values in logits.items():
            probabilities = torch.softmax(values[0].float(), 0).T.cpu()
            rows[head] += [
                probabilities[frame_steps["step"][:, 0] == step].mean(0).numpy() for step in range(steps)
            ]
    return {head: np.stack(values) for head, values in rows.items()}, samples / SAMPLE_RATE
