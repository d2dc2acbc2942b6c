"""The command line. Results go to stdout; progress, notes and errors to stderr.

Exit codes: 0 all well; 1 some inputs failed; 2 misuse, or the input was refused.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundnet_port
from soundnet_port.audio import DECODERS
from soundnet_port.weights import RELEASED_URL

if TYPE_CHECKING:
    from soundnet_port.conversion.convert import Refused, Report
    from soundnet_port.prediction import Category, Prediction

FAILED, REFUSED = 1, 2
_BAR_FROM = 10  # files


class Misuse(Exception):
    """Arguments that cannot work: one line, exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):  # file names may hold anything
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    from soundnet_port.conversion.convert import Refused
    from soundnet_port.weights import WeightsError

    run: Callable[[argparse.Namespace], int] = options.run
    try:
        code = run(options)
        sys.stdout.flush()
        return code
    except (Misuse, Refused, WeightsError) as error:
        _complain(error)
        return REFUSED
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `soundnet-port ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        _complain(f"{error.filename or 'input/output'}: {error.strerror or error}")
        return REFUSED
    except KeyboardInterrupt:
        return 130


def _convert(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.convert import convert

    return _show_all(convert(options.source, options.output, force=options.force), options.json)


def _fetch(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.fetch import fetch

    return _show_all(fetch(options.url, destination=options.output, force=options.force), options.json)


def _show_all(results: Iterable[Report | Refused], as_json: bool) -> int:
    """Shows conversions as they come; returns the exit code."""
    from soundnet_port.conversion.convert import Report

    done = refused = 0
    for result in results:
        if isinstance(result, Report):
            done += 1
            _show_report(result, as_json, verb="unchanged" if result.unchanged else "wrote")
        else:
            refused += 1
            _complain(result)
    return (FAILED if done else REFUSED) if refused else 0


def _verify(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.convert import verify
    from soundnet_port.conversion.proof import ProofFailed

    try:
        report = verify(options.weights, options.source)
    except ProofFailed as failure:
        _complain(failure)
        return FAILED
    _show_report(report, options.json, verb="verified")
    return 0


def _info(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.convert import Refused
    from soundnet_port.conversion.info import listing
    from soundnet_port.conversion.t7 import T7Error, members, open_t7
    from soundnet_port.weights import SUFFIX, find_weights

    path = Path(options.file)
    if path.suffix == SUFFIX or not path.exists():
        _show_weights(find_weights(options.file), options.json)
        return 0
    try:
        for member in members(path):
            with open_t7(path, member) as file:
                lines = list(listing(file))
            print(json.dumps(lines) if options.json else "\n".join(lines))
    except T7Error as error:
        raise Refused(f"{path}: {error}") from None
    return 0


def _predict(options: argparse.Namespace) -> int:
    import torch

    from soundnet_port.prediction import predict
    from soundnet_port.weights import load_pretrained

    if options.top < 1:
        raise Misuse(f"--top must be at least 1, not {options.top}")
    try:
        device = torch.device(options.device)
        model = load_pretrained(options.weights, device)
    except (RuntimeError, AssertionError) as error:  # torch on a device that is not there
        raise Misuse(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    if not model.architecture.heads:
        raise Misuse(f"{options.weights}: these weights have no heads, they cannot name sounds")
    failures = 0
    for path in _with_bar(list(_sounds(options.sounds))):
        try:
            if isinstance(path, Misuse):
                raise path
            prediction = predict(model, path, top=options.top, decoder=options.decoder)
        except (Misuse, ValueError, RuntimeError, MemoryError) as error:
            failures += 1
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            _complain(text if str(path) in text else f"{path}: {text}")
            continue
        if options.json:
            print(json.dumps({"file": str(path)} | prediction.to_dict(frames=options.over_time)))
        else:
            print(_as_text(str(path), prediction, options.over_time))
    return FAILED if failures else 0


def _demo(options: argparse.Namespace) -> int:
    from soundnet_port.demo import demo

    demo()
    return 0


def _sounds(arguments: Sequence[str]) -> Iterator[Path | Misuse]:
    """The files that arguments name: files, directories (searched) and @lists of paths."""
    from soundnet_port.audio import SUFFIXES

    for argument in arguments:
        if argument.startswith("@") and not Path(argument).exists():
            try:
                text = (
                    sys.stdin.read()
                    if argument == "@-"
                    else Path(argument[1:]).read_text("utf-8", errors="surrogateescape")
                )
            except OSError as error:
                yield Misuse(f"{argument[1:]}: {error.strerror or error}")
                continue
            yield from (Path(line) for line in text.splitlines() if line.strip())
        elif Path(argument).is_dir():
            inside = (
                Path(folder, name)
                for folder, _, names in os.walk(argument)
                for name in names
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith("._")
            )
            found = sorted(inside)
            yield from found
            if not found:
                yield Misuse(f"{argument}: no sound files in this directory")
        else:
            yield Path(argument)


def _with_bar(paths: list[Path | Misuse]) -> Iterator[Path | Misuse]:
    """The paths, with a progress bar if there are many and the results scroll elsewhere."""
    from tqdm import tqdm

    quiet = len(paths) < _BAR_FROM or sys.stdout.isatty() or not sys.stderr.isatty()
    yield from tqdm(paths, unit="file", disable=quiet)


def _as_text(name: str, prediction: Prediction, over_time: bool) -> str:
    def cell(category: Category) -> str:
        return f"{category.probability:.4f}  {_clip(category.label, 38)}"

    repeated = f", played {prediction.repeats} times to reach 10 s" if prediction.repeated else ""
    lines = [f"{name}  ({prediction.seconds:.2f} s{repeated})"]
    lines.append(f"  {'objects':<48}scenes")
    for i in range(max(len(prediction.objects), len(prediction.scenes))):
        left, right = (
            cell(side[i]) if i < len(side) else "" for side in (prediction.objects, prediction.scenes)
        )
        lines.append(f"  {left:<48}{right}".rstrip())
    if over_time:
        lines.append(f"  {'seconds heard':<24}{'object':<48}scene")
        for frame in prediction.frames:
            heard = f"{frame.start:8.2f} to {frame.end:8.2f}"
            lines.append(f"  {heard:<24}{cell(frame.objects[0]):<48}{cell(frame.scenes[0])}")
    lines.append(f"  middle frame: {cell(prediction.middle[0])} | {cell(prediction.middle[1])}")
    return "\n".join(lines)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _show_report(report: Report, as_json: bool, verb: str) -> None:
    if as_json:
        rows = [
            {
                "module": row.module,
                "layer": row.layer,
                "shape": list(row.shape),
                "largest": row.largest,
                "error": row.error,
                "relative": row.relative,
                "alone": row.alone,
            }
            for row in report.proof
        ]
        text = {
            "source": report.source,
            "weights": str(report.weights),
            "result": verb,
            "seconds": report.seconds,
            "proof_seconds": report.proof_seconds,
            "metadata": {key: value for key, value in report.metadata.items() if key != "categories"},
            "proof": rows,
        }
        print(json.dumps(text))
        return
    from soundnet_port.conversion.proof import TOLERANCE

    print(f"{report.source} ({report.form})")
    print("  The file's own graph in float64 against the network loaded from the weights:")
    print(f"  {'module':>8}  {'layer':<14}{'channels x frames':>18}{'largest':>10}", end="")
    print(f"{'error':>10}{'relative':>10}{'on noise':>10}")
    for row in report.proof:
        alone = "" if row.alone is None else f"{row.alone:.1e}"
        shape = " x ".join(map(str, row.shape))
        print(
            f"  {row.module:>8}  {row.layer:<14}{shape:>18}{row.largest:>10.3f}{row.error:>10.1e}"
            f"{row.relative:>10.1e}{alone:>10}"
        )
    worst = max(row.relative for row in report.proof)
    print(f"  proven: worst {worst:.1e} of a layer's largest value, {TOLERANCE:.0e} allowed")
    for note in report.metadata.get("ignored") or []:
        print(f"  note: {note}")
    front = report.metadata.get("released_front")
    print(f"  front (conv1-2, bn1-2) of MIT's released 8-layer network: {'yes' if front else 'no'}")
    print(f"  {verb} {report.weights} ({report.seconds:.2f} s, the proof {report.proof_seconds:.2f} s)")


def _show_weights(path: Path, as_json: bool) -> None:
    from soundnet_port.weights import read_weights

    architecture, state, metadata = read_weights(path)
    if as_json:
        print(json.dumps({"file": str(path), **metadata}))
        return
    print(f"{path}: weights of {architecture.name}, {path.stat().st_size:,} bytes")
    print(f"  {'layer':<10}{'module':>8}{'channels':>10}{'stride':>9}{'receptive field':>17}{'seconds':>9}")
    for name, layer in architecture.layers.items():
        seconds = layer.receptive_field / soundnet_port.SAMPLE_RATE
        print(
            f"  {name:<10}{layer.module:>8}{layer.channels:>10}{layer.stride:>9,}"
            f"{layer.receptive_field:>17,}{seconds:>9.3f}"
        )
    parameters = sum(tensor.numel() for name, tensor in state.items() if "running" not in name)
    print(f"  parameters: {parameters:,}")
    print(f"  category names: {'yes' if metadata.get('categories') else 'none stored'}")
    source = metadata.get("source") or {}
    print(f"  source: {source.get('form')}, {source.get('bytes'):,} bytes, sha256 {source.get('sha256')}")
    proof = metadata.get("proof") or {}
    print(f"  converter {metadata.get('converter')}, proof: worst {proof.get('worst')} relative")
    front = metadata.get("released_front")
    detail = " (conv1-2 and bn1-2; deeper layers are not covered by this)" if front else ""
    print(f"  released_front: {'true' if front else 'false'}{detail}")
    for note in metadata.get("ignored") or []:
        print(f"  note: {note}")


def _complain(error: object) -> None:
    print(f"soundnet-port: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _conversion_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("-o", "--output", metavar="DST", help=".safetensors file or folder")
    sub.add_argument("-f", "--force", action="store_true", help="replace weights that differ")
    sub.add_argument("--json", action="store_true", help="one JSON object per network")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="soundnet-port",
        description="SoundNet: names the objects and scenes in a sound. Exact, proven against Torch7.",
        epilog="Start with 'soundnet-port demo'. Then convert MIT's released networks, once:\n"
        "  soundnet-port convert soundnet_models_public.zip\n"
        "and use them:\n"
        "  soundnet-port predict dog.wav",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"soundnet-port {soundnet_port.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, **texts: Any) -> Any:
        sub = commands.add_parser(
            name,
            help=summary,
            description=texts.get("description", summary),
            epilog=texts.get("epilog"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    sub = command(
        "convert",
        _convert,
        "make weights from Torch7 files, and prove them",
        description="Reads a Torch7 .t7 file of SoundNet, or a zip with several without unpacking it,\n"
        "maps it, writes the weights, and proves them: the file's own graph is run module\n"
        "by module and compared with the network loaded from the written weights.\n"
        "What is not exactly SoundNet is refused with the reason; nothing is written then.",
        epilog="examples:\n"
        "  soundnet-port convert soundnet_models_public.zip   both released networks\n"
        "  soundnet-port convert soundnet8_final.t7 -o weights/soundnet8.safetensors",
    )
    sub.add_argument("source", metavar="SRC", help=".t7 file (binary or ascii) or zip")
    _conversion_options(sub)

    sub = command(
        "fetch",
        _fetch,
        "download MIT's released networks and convert them",
        description=f"Downloads {RELEASED_URL}\n"
        "(101 MB, kept in the cache folder), converts both networks with their proofs, and says\n"
        "whether they are the released ones. Then 'soundnet8' and 'soundnet5' are there by name.",
    )
    sub.add_argument("--url", default=RELEASED_URL, help="a mirror, or a zip on this machine")
    _conversion_options(sub)

    sub = command(
        "verify",
        _verify,
        "prove existing weights against their Torch7 file",
        description="Runs the proof of a conversion again: every tensor must be the file's bit for bit,\n"
        "and the file's own graph must agree at every module. Exit code 1 if it does not.",
    )
    sub.add_argument("weights", metavar="WEIGHTS", help="a name (soundnet8) or a .safetensors file")
    sub.add_argument("source", metavar="SRC", help=".t7 file or zip")
    sub.add_argument("--json", action="store_true", help="the report as a JSON object")

    sub = command(
        "info",
        _info,
        "what is in a .t7, zip or weights file",
        description="Lists modules, classes, settings and shapes of any Torch7 file, or layers and\n"
        "metadata of weights, and says whether a Torch7 file can be converted.",
    )
    sub.add_argument("file", metavar="FILE", help=".t7, .zip, .safetensors, or a weights name")
    sub.add_argument("--json", action="store_true", help="metadata or lines as JSON")

    sub = command(
        "predict",
        _predict,
        "name the objects and scenes in sounds",
        description="For each sound: the top objects and scenes (probabilities, mean over time) and the\n"
        "answer that the original prints, that of the middle frame. A clip under 10 s is\n"
        "repeated, as in the original. Goes on past bad files; exit code 1 if there were any.",
        epilog="examples:\n"
        "  soundnet-port predict dog.wav street.mp3\n"
        "  soundnet-port predict recordings/ --over-time\n"
        "  soundnet-port predict @files.txt --json > predictions.jsonl",
    )
    sub.add_argument(
        "sounds",
        metavar="SOUND",
        nargs="+",
        help="file, - (a sound on stdin), directory (searched), or @LIST: a text file with a path per line, "
        "@- is a list on stdin",
    )
    sub.add_argument("-w", "--weights", default="soundnet8", help="name or file (default: soundnet8)")
    sub.add_argument("-n", "--top", type=int, default=5, help="categories to show (default: 5)")
    sub.add_argument("-t", "--over-time", action="store_true", help="also a line for each frame")
    sub.add_argument("--json", action="store_true", help="one JSON object per sound")
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    sub.add_argument(
        "--decoder",
        choices=DECODERS,
        default="auto",
        help="auto (default), soundfile, av, or sox: what Torch7 heard, to the sample",
    )

    command(
        "demo",
        _demo,
        "see it work without the released weights",
        description="Converts a small Torch7 file that comes along, proves it, and names a sound that it\n"
        "makes. The parameters of that file are made up, and so is the answer.",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
