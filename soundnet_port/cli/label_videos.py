"""The commands label-videos and label-sounds: training data from image classifiers, or from a SoundNet."""

from __future__ import annotations

import argparse

from soundnet_port.cli.options import add_device_option, add_weights_option, load_network, parse_device
from soundnet_port.cli.parser import AddCommand
from soundnet_port.cli.reporting import ProgressReporter, UsageError, report_corpus
from soundnet_port.errors import require


def add_commands(add_command: AddCommand) -> None:
    """Add label-videos and label-sounds."""
    _add_label_videos(add_command)
    command = add_command(
        "label-sounds",
        _label_sounds,
        "make training data from sounds and a trained network",
        description="Writes the probabilities that a trained network, the teacher, gives to each 5 s of\n"
        "sounds, and a manifest, OUT/manifest.tsv, for 'train'. The teacher hears 20 s at a time;\n"
        "shorter sounds are repeated. The same command resumes an interrupted run. Sounds that fail\n"
        "are skipped; exit code 1 if there were any.",
        examples=(
            "soundnet-port label-sounds recordings/ -o labels/",
            "soundnet-port train labels/manifest.tsv -o run/ --architecture soundnet5",
        ),
        resumable=True,
    )
    _add_paths(command, "sounds")
    add_weights_option(command)
    add_device_option(command)
    command.add_argument("--root", metavar="DIR", help="folder that the names in OUT are relative to")


def _add_label_videos(add_command: AddCommand) -> None:
    command = add_command(
        "label-videos",
        _label_videos,
        "make training data from videos",
        description="Shows a frame of every 5 s of videos to image classifiers, the teachers, and writes\n"
        "their probabilities and a manifest, OUT/manifest.tsv, for 'train'. A teacher is an image\n"
        "classification model on the Hugging Face hub, or a folder with one (extra [videos]). The\n"
        "same command resumes an interrupted run. Videos that fail are skipped; exit code 1 if\n"
        "there were any.",
        examples=(
            "soundnet-port label-videos videos/ -o labels --teacher objects=microsoft/resnet-50",
            "soundnet-port label-videos videos/ -o labels --teacher objects=microsoft/resnet-50 \\",
            "    --teacher objects=google/vit-base-patch16-224 --teacher scenes=my-places-model/",
        ),
        resumable=True,
    )
    _add_paths(command, "videos")
    command.add_argument(
        "--teacher",
        metavar="HEAD=MODEL",
        action="append",
        required=True,
        help="for the head objects or scenes: a model on the hub, or a folder; can be repeated",
    )
    command.add_argument("--batch", type=int, default=32, metavar="N", help="frames at once (default: 32)")
    command.add_argument(
        "--workers", type=int, metavar="N", help="threads that decode (default: one for each CPU)"
    )
    add_device_option(command)
    command.add_argument("--root", metavar="DIR", help="folder that the names in OUT are relative to")


def _add_paths(command: argparse.ArgumentParser, kind: str) -> None:
    """Add what is labeled, "sounds" or "videos", and where to."""
    command.add_argument(
        kind,
        metavar=kind.upper().removesuffix("S"),
        nargs="+",
        help="file, directory (searched), or @LIST: a text file with a path per line; @- is a list on stdin",
    )
    command.add_argument("-o", "--output", metavar="OUT", required=True, help="folder")


def _label_videos(options: argparse.Namespace) -> int:
    teachers: dict[str, list[str]] = {}
    for teacher in options.teacher:
        head, equals, model = teacher.partition("=")
        if not (equals and model):
            raise UsageError(f"--teacher {teacher}: name its head, as in objects={teacher or 'MODEL'}")
        teachers.setdefault(head, []).append(model)
    logging = require("transformers.utils", "videos").logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from soundnet_port.learning.video_labeling import label_videos

    try:
        with ProgressReporter() as progress:
            result = label_videos(
                options.videos,
                options.output,
                teachers,
                batch=options.batch,
                workers=options.workers,
                device=parse_device(options.device),
                root=options.root,
                progress=progress,
            )
    except RuntimeError as error:  # torch, of a device or its memory, with a stack
        raise UsageError(str(error).splitlines()[0]) from None
    return report_corpus(result)


def _label_sounds(options: argparse.Namespace) -> int:
    from soundnet_port.learning.sound_labeling import label_sounds

    model = load_network(options)
    with ProgressReporter() as progress:
        result = label_sounds(
            model,
            options.sounds,
            options.output,
            name=options.weights,
            root=options.root,
            progress=progress,
        )
    return report_corpus(result)
