"""Encoding models: predict what was measured while sounds were played from each layer of a network.

Ridge regression per layer, on rows of features that are aligned with the measurements (fMRI volumes),
z-scored within runs and delayed as the response is. All figures are of held-out runs, and each output's
penalty is chosen without them (see ridge.py). All layers are fitted to, and tested on, the same volumes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from numbers import Integral

import numpy as np

from soundnet_port.learning.encoding_data import (
    MOST_FOLDS,
    Recording,
    assign_folds,
    list_recordings,
)
from soundnet_port.learning.encoding_design import (
    assemble_predictors,
    assemble_targets,
    compute_noise_ceiling,
    extract_sounds,
    select_volumes,
)
from soundnet_port.learning.encoding_features import (
    AlignedFeatures,
    check_decoder,
    create_response,
    default_layers,
)
from soundnet_port.learning.encoding_results import EncodingResult
from soundnet_port.learning.errors import EncodingError
from soundnet_port.learning.feature_cache import open_cache
from soundnet_port.learning.ridge import check_alphas, count_steps, cross_validate_ridge
from soundnet_port.network.model import SoundNet
from soundnet_port.pretrained import load_pretrained
from soundnet_port.progress import Progress, ProgressCallback


def fit_encoding_models(
    model: SoundNet | str | os.PathLike[str],
    recordings: Sequence[Recording] | str | os.PathLike[str],
    *,
    tr: float,
    layers: Sequence[str | int] | None = None,
    delays: Sequence[int] | None = None,
    hrf: str | None = None,
    align: str = "center",
    alphas: Sequence[float] | None = None,
    folds: int = MOST_FOLDS,
    edge_frames: bool = False,
    predictions: bool = False,
    decoder: str = "auto",
    cache: str | os.PathLike[str] | bool = True,
    progress: ProgressCallback | None = None,
) -> EncodingResult:
    """Fit ridge regression from each layer to recorded targets, and test it on held-out runs.

    Args:
        model: a SoundNet, or weights as for `load_pretrained`. Its device computes all.
        recordings: the recordings, or a table that `read_recordings` reads.
        tr: seconds from one row of targets to the next: fMRI's repetition time.
        layers: names, or Torch7's module numbers; by default the trunk's, after pooling where there is one.
        delays: in periods, 0 or more: each channel is a predictor once per delay. By default those from 2 to
            8 s, or four of them where there are more than five.
        hrf: in place of delays, convolve channels with this hemodynamic response: "glover" or "spm"; or
            "none" to predict each period from itself.
        align: "center" or "end", see `soundnet_port.inference.alignment.align`.
        alphas: ridge penalties to choose from, as scikit-learn's `Ridge(alpha)`; by default
            thirteen from 10 to 1e7.
        folds: held-out sets at most. With that many runs or fewer, each is held out in turn; with more, they
            are held out several at a time.
        edge_frames: include edge frames (see `SoundNet.edge_frames`).
        predictions: keep the predictions of held-out volumes.
        decoder: of sound files, see `load_audio`.
        cache: folder that keeps aligned features, as for `evaluate`.
        progress: called after each sound, and after each penalty of each layer.

    Raises:
        EncodingError: the recordings, a sound or a setting cannot be used.
        WeightsError: no such weights.
        MissingExtraError: targets in an HDF5 file, and the extra `[hdf5]` is not installed.
    """
    start = time.monotonic()
    response = create_response(tr, delays, hrf)
    penalties = check_alphas(alphas)
    if not isinstance(folds, Integral) or folds < 2:
        raise EncodingError(f"folds: a whole number of 2 or more, not {folds}")
    check_decoder(decoder)
    listed = list_recordings(recordings)
    fold_of, fold_names = assign_folds(listed, folds)
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    keys = list(layers or default_layers(model.architecture))
    feature_cache = open_cache(cache, model)
    try:
        extractor = AlignedFeatures(
            model, keys, tr, align, edge_frames=edge_frames, decoder=decoder, cache=feature_cache
        )
    except ValueError as error:
        raise EncodingError(str(error)) from None
    sounds = extract_sounds(extractor, listed, progress)
    extracted = time.monotonic()
    rows, notes = select_volumes(listed, sounds, response, tr)
    if feature_cache and feature_cache.write_error:
        notes.append(f"features are not cached: {feature_cache.write_error}")
    for fold, name in enumerate(fold_names):
        if sum(len(own.kept) for own, at in zip(rows, fold_of, strict=True) if at == fold) < 2:
            raise EncodingError(f"run {name}: fewer than two volumes can be used; see onset and tr")
    targets, usable, target_notes = assemble_targets(listed, rows)
    notes += target_notes
    result = EncodingResult.empty(
        layers=tuple(keys),
        channels=tuple(model.architecture.layer(key).channels for key in keys),
        folds=tuple(fold_names),
        outputs=len(usable),
        volumes=len(targets),
        predicted_volumes=sum(len(recording.targets) for recording in listed) if predictions else None,
        settings={
            "network": model.architecture.name,
            "tr": tr,
            **response.describe(hrf),
            "align": align,
            "edge_frames": edge_frames,
            "alphas": list(penalties),
        },
    )
    result.noise_ceiling[:] = compute_noise_ceiling(listed, sounds, rows, targets, usable)
    # where each kept volume is among all volumes of the table
    starts = np.cumsum([0, *(len(recording.targets) for recording in listed[:-1])])
    volumes = np.concatenate([own.kept + at for own, at in zip(rows, starts, strict=True)])
    row_folds = np.repeat(np.array(fold_of, np.int64), [len(own.kept) for own in rows])
    device = next(model.parameters()).device
    done, steps = 0, count_steps(int(usable.sum()), len(penalties))

    def report_step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(Progress(done, steps * len(keys), "fit", note=str(key)))

    # the widest layer first: it takes longest, so the time left is not underestimated
    for number in sorted(range(len(keys)), key=lambda number: -result.channels[number]):
        key = keys[number]
        predictors, _ = assemble_predictors(listed, sounds, rows, key, response)
        fit = cross_validate_ridge(
            predictors[:, predictors.any(0)],
            targets,
            row_folds,
            penalties,
            predictions=predictions,
            device="cpu" if device.type == "mps" else device,  # which has no float64
            on_step=report_step,
        )
        result.fold_correlation[number][:, usable] = fit.correlation
        result.fold_r2[number][:, usable] = fit.r2
        result.alpha[number][:, usable] = fit.alpha
        if result.predictions is not None and fit.predictions is not None:
            result.predictions[number][np.ix_(volumes, np.flatnonzero(usable))] = fit.predictions
    notes += _alpha_notes(result, penalties)
    result.notes.extend(notes)
    result.seconds.update(features=extracted - start, ridge=time.monotonic() - extracted)
    return result


def _alpha_notes(result: EncodingResult, alphas: Sequence[float]) -> list[str]:
    """Note layers where the smallest penalty is often the best: a smaller one may be better.

    The largest one is what outputs that nothing predicts get.
    """
    if len(alphas) < 2:
        return []
    shares = [float(np.mean(alpha[np.isfinite(alpha)] <= np.float32(alphas[0]))) for alpha in result.alpha]
    names = [str(layer) for layer, share in zip(result.layers, shares, strict=True) if share > 0.2]
    if not names:
        return []
    return [f"{', '.join(names)}: often the smallest alpha, {alphas[0]:g}; try smaller ones, too (--alphas)"]
