"""The command predict: the objects and scenes in sounds."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from soundnet_port.audio.finding import is_url
from soundnet_port.audio.loudness import NORMALIZED
from soundnet_port.cli.options import load_network, warn_if_unused
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import UsageError
from soundnet_port.cli.results import Results, open_file_of_results
from soundnet_port.cli.sounds import (
    SoundInput,
    add_sound_options,
    list_sounds,
    mirror_sounds,
    note_existing,
    process_sounds,
)
from soundnet_port.inference.prediction_formats import (
    FORMATS,
    apply_threshold,
    format_wide_header,
    format_wide_row,
)

if TYPE_CHECKING:
    from soundnet_port.inference.prediction import Prediction
    from soundnet_port.network.model import SoundNet

# of OUT, which name a file instead of a folder; the first format is the default
_FILE_FORMATS = {
    ".txt": ("text", "audacity", "raven"),
    ".json": ("json",),
    ".jsonl": ("json",),
    ".csv": ("csv", "wide-csv"),
    ".srt": ("srt",),
    ".vtt": ("vtt",),
}
_OTHER_SUFFIXES = (".tsv", ".xml", ".h5", ".hdf5", ".parquet", ".html", ".gz", ".zip", ".xlsx")
_TOP, _LABELS_TOP = 5, 1  # categories by default; several in labels over time overlap


def add_commands(add_command: AddCommand) -> None:
    """Add predict."""
    command = add_command(
        "predict",
        _predict,
        "name the objects and scenes in sounds",
        description="Prints for each sound the top objects and scenes (probabilities, mean over time), or\n"
        "writes them: tables, subtitles, labels for Audacity and Raven. Edge frames, which see\n"
        "zeros past the sound's end, are left out; a clip too short to have others is repeated.\n"
        "Sounds that fail are skipped; exit code 1 if there were any.",
        examples=(
            "soundnet-port predict dog.wav street.mp3",
            "soundnet-port predict recordings/ --over-time",
            "soundnet-port predict recordings/ -o labels/ --format raven --threshold 0.2",
            "soundnet-port predict film.mp4 --format srt > film.srt",
            "soundnet-port predict @files.txt --format wide-csv -o clips.csv",
        ),
        resumable=True,
    )
    command.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="folder with a file per sound, such as OUT/dog.wav.srt; or a file (.txt, .json, .csv, .srt, "
        ".vtt)",
    )
    command.add_argument(
        "-n", "--top", type=int, help="categories of each head (default: 5; in labels over time 1)"
    )
    command.add_argument(
        "--threshold", type=float, metavar="P", help="only categories with at least this probability, 0 to 1"
    )
    command.add_argument("-t", "--over-time", action="store_true", help="also a line for each frame")
    command.add_argument(
        "--plot",
        metavar="OUT",
        help="draw waveform and categories over time: .png or .svg file, or a folder with a .png for each "
        "sound (extra [plot])",
    )
    command.add_argument(
        "--edge-frames",
        action="store_true",
        help="as the original: all frames, clips repeated to 10 s; --format torch7 always does so",
    )
    command.add_argument(
        "--normalize",
        action="store_true",
        help=f"first bring each sound's loudest second to {NORMALIZED:.0f} dB of full scale",
    )
    formats = ("text", "json", "csv", "wide-csv", "srt", "vtt", "audacity", "raven", "torch7")
    add_sound_options(command, formats, "X.soundnet_categories.h5", "by OUT's suffix, or text")


def _predict(options: argparse.Namespace) -> int:
    file_format = _choose_format(options)
    folder = None if _is_file(options.output) else options.output
    model = load_network(options)
    _check_heads(options, model, file_format)
    sounds = list_sounds(options.sounds)
    if _is_labels(file_format) and len(sounds) > 1 and not folder:
        raise UsageError(
            f"--format {file_format}: each of the {len(sounds)} sounds gets a file; name a folder with -o"
        )
    plots = _plot_paths(options, sounds) if options.plot else {}
    bases = mirror_sounds(sounds, options.sounds, folder) if folder else {}
    files = _result_files(sounds, bases, file_format)
    options.resumable = folder is not None  # a table begins anew

    with _open_results(options, files, _format_header(model, file_format)) as results:

        def save(path: Path, prediction: Prediction) -> None:
            if file_format == "torch7":
                _write_torch7(bases.get(path, path), prediction, prints=not folder)
                results.add(path)
            elif file_format == "wide-csv":
                results.write(path, format_wide_row(str(path), prediction))
            else:
                if options.threshold is not None:
                    prediction = apply_threshold(prediction, options.threshold)
                results.write(path, FORMATS[file_format].write(str(path), prediction, options.over_time))

        def process(path: Path) -> str | None:
            plot = plots.get(path)
            if plot is not None and plot.exists() and not options.force:
                if not files and not options.output:  # printed when it was drawn
                    return note_existing(plot)
                plot = None
            if results.is_done(path) and plot is None:
                return None if folder else note_existing(files[path])
            prediction = _predict_sound(options, model, path, plot, file_format)
            if not results.is_done(path):
                save(path, prediction)
            return _note_level(path, prediction)

        code = process_sounds(sounds, process, prints=not options.output)
    if folder:
        results.summarize(folder)
    return code


def _choose_format(options: argparse.Namespace) -> str:
    """Check options that need no network; return the format, by default that of OUT's suffix, or text."""
    if options.top is not None and options.top < 1:
        raise UsageError(f"--top must be at least 1, not {options.top}")
    if options.threshold is not None and not 0 <= options.threshold <= 1:
        raise UsageError(f"--threshold must be a probability from 0 to 1, not {options.threshold:g}")
    output, is_file = options.output, _is_file(options.output)
    file_format: str = options.format or "text"
    if is_file and not options.format:
        file_format = _FILE_FORMATS[Path(output).suffix.lower()][0]
    if output == "-":
        raise UsageError("-o -: leave out -o to print")
    if file_format == "torch7" and is_file:
        raise UsageError("--format torch7: a file per sound; name a folder, or leave out -o")
    if is_file and file_format not in _FILE_FORMATS[Path(output).suffix.lower()]:
        raise UsageError(f"{output}: another suffix than that of --format {file_format}; rename it")
    if output and not is_file:
        if Path(output).suffix.lower() in _OTHER_SUFFIXES and not Path(output).is_dir():
            raise UsageError(f"{output}: neither a folder nor a file in {', '.join(_FILE_FORMATS)}")
        if is_url(output):
            raise UsageError(f"{output}: an address; name a folder or file on this machine")
        if Path(output).exists() and not Path(output).is_dir():
            raise UsageError(f"{output}: not a folder; files end in {', '.join(_FILE_FORMATS)}")
        if file_format == "wide-csv":
            raise UsageError("--format wide-csv is one table for all sounds; name a file such as clips.csv")
    condition = f"with --format {file_format}"
    if file_format in ("torch7", "wide-csv"):
        warn_if_unused(options, condition, "over_time", "top", "threshold")
    elif _is_labels(file_format):
        warn_if_unused(options, condition, "over_time")
    if not output and not options.plot and file_format != "torch7":
        warn_if_unused(options, "without -o, --plot or --format torch7", "force")
    return file_format


def _is_file(output: str | None) -> bool:
    """Whether OUT is a file for all sounds, not a folder."""
    return output is not None and Path(output).suffix.lower() in _FILE_FORMATS and not Path(output).is_dir()


def _is_labels(file_format: str) -> bool:
    return file_format in FORMATS and FORMATS[file_format].labels


def _check_heads(options: argparse.Namespace, model: SoundNet, file_format: str) -> None:
    from soundnet_port.network.architecture import CLASSES

    if not model.architecture.output_sizes:
        raise UsageError(f"{options.weights}: cannot name sounds, it has no heads")
    if file_format == "torch7" and CLASSES in model.architecture.output_sizes:
        raise UsageError(f"--format torch7 is for objects and scenes; {options.weights} has other classes")


def _result_files(
    sounds: Sequence[SoundInput], bases: Mapping[Path, Path], file_format: str
) -> dict[Path, Path]:
    """Map sounds to their results' files, where each has its own."""
    if file_format == "torch7":
        from soundnet_port.inference.torch7_files import torch7_path

        paths = [path for path in sounds if isinstance(path, Path)]
        return {path: torch7_path(bases.get(path, path), "soundnet_categories") for path in paths}
    return {path: base.with_name(base.name + FORMATS[file_format].suffix) for path, base in bases.items()}


def _plot_paths(options: argparse.Namespace, sounds: Sequence[SoundInput]) -> dict[Path, Path]:
    """Map sounds to plots: one file for a single sound, or a folder that mirrors the sounds' folders."""
    from soundnet_port.viewing.figures import SUFFIXES, check_figure_path

    target = Path(options.plot)
    is_file = target.suffix.lower() in SUFFIXES
    if is_file and len(sounds) > 1:
        raise UsageError(f"--plot {target}: one file for {len(sounds)} sounds; name a folder")
    check_figure_path(target if is_file else target / f"X{SUFFIXES[0]}")
    if is_file:
        return {path: target for path in sounds if isinstance(path, Path)}
    bases = mirror_sounds(sounds, options.sounds, target)
    return {path: base.with_name(base.name + SUFFIXES[0]) for path, base in bases.items()}


def _format_header(model: SoundNet, file_format: str) -> str:
    if file_format != "wide-csv":
        return FORMATS[file_format].header if file_format in FORMATS else ""
    from soundnet_port.network.categories import category_name

    sizes = model.architecture.output_sizes
    return format_wide_header(
        {
            head: [category_name(model.categories, head, i) for i in range(size)]
            for head, size in sizes.items()
        }
    )


def _open_results(
    options: argparse.Namespace, files: Mapping[Path, Path], header: str
) -> AbstractContextManager[Results]:
    if _is_file(options.output):
        return open_file_of_results(options.output, header, options.force)
    is_stream = not files and not options.output
    return nullcontext(Results(None if is_stream else files, header=header, force=options.force))


def _predict_sound(
    options: argparse.Namespace, model: SoundNet, path: Path, plot: Path | None, file_format: str
) -> Prediction:
    """Predict one sound, and draw it if there is a path for that."""
    from soundnet_port.audio.loading import read_sound
    from soundnet_port.inference.prediction import predict

    # a plot needs the waveform too, and standard input can be read only once
    sound = read_sound(path, decoder=options.decoder) if plot is not None else None
    # a pooled head hears up to 22 kHz of a file
    from_file = model.architecture.pooled_head and path != Path("-")
    prediction = predict(
        model,
        path if sound is None or from_file else sound.waveform,
        top=options.top or (_LABELS_TOP if _is_labels(file_format) else _TOP),
        decoder=options.decoder,
        edge_frames=options.edge_frames or file_format == "torch7",
        normalize=options.normalize,
    )
    if sound is not None and plot is not None:
        from soundnet_port.viewing.figures import write_figure
        from soundnet_port.viewing.prediction_plots import plot_prediction

        prediction = replace(prediction, decoder=sound.decoder)
        write_figure(plot_prediction(prediction, sound.waveform, path.name), plot)
    return prediction


def _write_torch7(base: Path, prediction: Prediction, *, prints: bool) -> None:
    from soundnet_port.inference.torch7_files import write_torch7_prediction

    written = write_torch7_prediction(base, prediction)
    if prints:
        print(written)


def _note_level(path: Path, prediction: Prediction) -> str | None:
    if prediction.level == -math.inf:
        return f"{path}: digital silence; the prediction means nothing"
    if prediction.quiet:
        return (
            f"{path}: quiet ({prediction.level:.0f} dB of full scale in its loudest second), unlike the "
            "sounds the network was trained on; try --normalize"
        )
    return None
