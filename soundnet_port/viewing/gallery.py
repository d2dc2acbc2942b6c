"""Pages for listening to hidden units: their top sounds with spectrograms and activations (extra `[plot]`).

A gallery is a folder of plain files that needs no server and asks nobody for anything:

    index.html              all units
    conv7/12.html           a unit: players, spectrograms, activations
    sounds/, pictures/      excerpts, each once, named by a hash of the file's name and the excerpt's place
    units.json              the table; units.parquet on demand
    errors.tsv              sounds that gave nothing, where there are any

It is made beside its place, in OUT.parts/, and put there when it is complete. Names of files come from
anywhere: they are shown as escaped text, and no address is made of them.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from soundnet_port.audio.loading import read_blocks
from soundnet_port.corpus.extractor import CorpusError
from soundnet_port.corpus.formats import FORMATS, write_failures
from soundnet_port.corpus.run import Progress, available_cpus
from soundnet_port.files import output_lock
from soundnet_port.learning.datasets import LabeledSounds
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE, Layer
from soundnet_port.network.engine import BLOCK
from soundnet_port.network.evaluation_mode import evaluation_mode
from soundnet_port.network.model import SoundNet
from soundnet_port.pretrained import load_pretrained
from soundnet_port.viewing.units import FOUND, TopSound, TopSounds, Unit, top_sounds, window

_PAGES = Path(__file__).parent / "pages"
_COLUMNS, _ROWS = 320, 112  # pixels of a spectrogram as wide as all that a unit sees
_LOWEST = 50.0  # Hz
_RANGE = 60.0  # dB below the loudest
_PITCHES = {100: "100 Hz", 1000: "1 kHz", 5000: "5 kHz"}  # that are marked


@dataclass(frozen=True)
class Excerpt:
    """What a frame sees of a sound, and the layer's frames around it.

    Attributes:
        asset: name of its sound and picture.
        first: number of the first frame of the curves.
        curves: activations by unit.
    """

    asset: str
    first: int
    curves: Mapping[int, tuple[float, ...]]


Excerpts = Mapping[tuple[str, str, int], Excerpt]  # by path, layer and frame


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
    progress: Callable[[Progress], None] | None = None,
    cutting: Callable[[int, int], None] | None = None,
) -> TopSounds:
    """Finds the top sounds of units, as `top_sounds` does, and writes pages with their excerpts.

    A pass over the corpus that was interrupted goes on where it was; excerpts are then all cut anew.

    Args:
        model: a SoundNet, or weights as for `load_pretrained`.
        output: a folder that is not there yet.
        inputs: as for `top_sounds`, and so are all that is not said here.
        layers: of the trunk, by name.
        top: sounds for each unit, 1 to 32.
        labels: classes of the sounds.
        fold: of the labelled sounds, the only one to be heard.
        edge_frames: count edge frames, too, and show them in curves.
        table: write units.parquet too (extra `[parquet]`).
        workers: processes, then threads that cut excerpts; by default as many as there are CPUs.
        decoder: of sound files.
        force: replaces a gallery, and starts anew what was interrupted.
        progress: called while the corpus is heard.
        cutting: called with the number of files whose excerpts are cut, and that of all of these.

    Raises:
        CorpusError: as `top_sounds`; something is there already, an extra is missing, or the folder
            cannot be written.
    """
    output = Path(output).expanduser()
    _colours()
    if table and (missing := FORMATS["parquet"].missing()):
        raise CorpusError(f"units.parquet: {missing}")
    if output.exists():
        if not force:
            raise CorpusError(f"{output}: is there already; --force replaces a gallery")
        if not _replaceable(output):
            raise CorpusError(f"{output}: is there already, and no gallery; choose another folder")
        for folder in filter(os.path.isdir, inputs):
            if output.resolve().is_relative_to(Path(folder).resolve()):
                raise CorpusError(
                    f"{output}: its excerpts would be among the sounds of {folder}; remove it first"
                )
    if not isinstance(model, SoundNet):
        model = load_pretrained(model)
    parts = output.with_name(f"{output.name}.parts")
    with output_lock(parts, output, CorpusError) as staging:
        found = top_sounds(
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
        if found.heard:
            made = staging / "gallery"
            try:
                excerpts = cut(model, found, made, workers=workers, decoder=decoder, cutting=cutting)
                _write_pages(made, found, excerpts, table)
                if output.exists():
                    output.rename(staging / "replaced")
                made.rename(output)
            except OSError as error:
                text = f"{error.filename or output}: {error.strerror or error}"
                raise CorpusError(f"{text}; the same command goes on") from None
        for left in (FOUND, f"{FOUND}.json", f"{FOUND}.errors.tsv"):
            (parts / left).unlink(missing_ok=True)
    return found


def _replaceable(folder: Path) -> bool:
    """Whether a folder is a gallery of ours, or an empty one."""
    return folder.is_dir() and ((folder / "gallery.css").is_file() or not any(folder.iterdir()))


# ---- excerpts


def cut(
    model: SoundNet,
    found: TopSounds,
    folder: Path,
    *,
    workers: int | None,
    decoder: str,
    cutting: Callable[[int, int], None] | None = None,
) -> Excerpts:
    """Cuts the excerpts, in threads, each file being read once; writes sounds and pictures.

    Raises:
        CorpusError: a file that has changed, or is gone, since it was heard.
    """
    wanted: dict[str, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for unit in found.units:
        for sound in unit.sounds:
            wanted[sound.path][unit.layer, sound.frame].append(unit.number)
    for name in ("sounds", "pictures"):
        (folder / name).mkdir(parents=True)
    excerpts: dict[tuple[str, str, int], Excerpt] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(workers or available_cpus(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        with evaluation_mode(model):
            tasks = {
                pool.submit(_cut, model, path, frames, found, decoder, folder): path
                for path, frames in wanted.items()
            }
            for number, task in enumerate(as_completed(tasks), 1):
                for (layer, frame), excerpt in task.result().items():
                    excerpts[tasks[task], layer, frame] = excerpt
                if cutting:
                    cutting(number, len(tasks))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
    return excerpts


@torch.no_grad()  # which is a thread's own
def _cut(
    model: SoundNet,
    path: str,
    wanted: Mapping[tuple[str, int], Sequence[int]],
    found: TopSounds,
    decoder: str,
    folder: Path,
) -> dict[tuple[str, int], Excerpt]:
    """The excerpts of one file."""
    excerpts: dict[tuple[str, int], Excerpt] = {}
    layers = found.layers
    spans = {(name, frame): context(layers[name], frame) for name, frame in wanted}
    device = next(model.parameters()).device
    try:
        for key, around in _pieces(path, decoder, spans):
            (name, frame), (frames, start, _) = key, spans[key]
            layer = layers[name]
            begin, end = (max(0, each - start) for each in window(layer, frame))
            before = start // layer.stride  # frames that are not in what was cut
            made = model.extract(around.to(device), [name])[name][0].float().cpu()
            # where the sound goes on behind the cut, these are behind the frames wanted
            edge = 0 if found.edge_frames else model.edge_frames(name, len(around))
            made = made[:, frames.start - before : min(frames.stop - before, made.shape[1] - edge)]
            if made.shape[1] <= frame - frames.start:
                raise CorpusError(f"{path}: is shorter than it was when it was heard; run the command again")
            samples = around[begin:end] / FULL_SCALE
            place = f"{start + begin} {start + begin + len(samples)} {layer.receptive_field} "
            asset = hashlib.sha256(place.encode() + os.fsencode(path)).hexdigest()[:20]
            kind, sound = _sound_suffix(), io.BytesIO()  # libsndfile has no errors for full disks
            soundfile.write(sound, samples.numpy(), SAMPLE_RATE, format=kind[1:])
            (folder / "sounds" / f"{asset}{kind}").write_bytes(sound.getvalue())
            _draw(samples, layer.receptive_field, folder / "pictures" / f"{asset}.png")
            curves = {unit: tuple(made[unit].tolist()) for unit in wanted[key]}
            excerpts[key] = Excerpt(asset, frames.start, curves)
    except CorpusError:
        raise
    except (ValueError, RuntimeError) as error:  # RuntimeError: torch's, with a stack
        reason = str(error).partition("\n")[0].removeprefix(f"{path}: ")
        raise CorpusError(f"{path}: {reason}; it could be used before, so run the command again") from None
    return excerpts


def context(layer: Layer, frame: int) -> tuple[range, int, int]:
    """The frames around one, as far again to either side as it sees; and start and end of what they see.

    The start is a multiple of the layer's stride, and so of that of every layer before. Cut there, a
    sound gives just these frames: they see nothing of the padding before the cut.
    """
    reach = math.ceil(layer.receptive_field / layer.stride)
    frames = range(max(0, frame - reach), frame + reach + 1)
    start = max(0, frames.start + layer.start // layer.stride) * layer.stride
    return frames, start, window(layer, frame + reach)[1]


def _pieces(
    path: str, decoder: str, spans: Mapping[tuple[str, int], tuple[range, int, int]]
) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """What there is of each span of a file's samples, in the memory of a block and the longest span."""
    waiting = sorted(spans, key=lambda key: spans[key][2])
    longest = max(end - start for _, start, end in spans.values())
    held, at = torch.empty(0), 0  # the last samples read, and the number of the first of these

    def until(last: int | None) -> Iterator[tuple[tuple[str, int], Tensor]]:
        while waiting and (last is None or spans[waiting[0]][2] <= last):
            key = waiting.pop(0)
            _, start, end = spans[key]
            yield key, held[max(0, start - at) : max(0, end - at)]

    for block in read_blocks(path, decoder=decoder, samples=BLOCK):
        held = torch.cat([held, block])
        yield from until(at + len(held))
        at += max(0, len(held) - longest)
        held = held[-longest:]
    yield from until(None)


@cache
def _sound_suffix() -> str:
    """MP3 plays everywhere; libsndfile has it since 1.1."""
    return ".mp3" if "MP3" in soundfile.available_formats() else ".flac"


def _mel(hertz: float) -> float:
    return 2595 * math.log10(1 + hertz / 700)  # O'Shaughnessy 1987


def spectrogram(samples: Tensor, field: int) -> Tensor:
    """Power in dB, the loudest at 0, down to -60; the highest of the mel-spaced frequencies first.

    Shape:
        samples: `(samples,)`, part of a receptive field of so many; returns `(112, columns)`
    """
    size = min(1024, max(64, 1 << (field // 8).bit_length()))
    columns = max(2, round(_COLUMNS * len(samples) / field))
    starts = torch.linspace(0, len(samples) - 1, columns).long()  # in what is padded by half a window
    padded = torch.nn.functional.pad(samples, (size // 2, size // 2))
    pieces = padded.unfold(0, size, 1)[starts] * torch.hann_window(size)
    made = _bands(size) @ torch.fft.rfft(pieces).abs().square().T
    loudest = made.max()
    if not loudest:
        return torch.full_like(made, -_RANGE)
    return 10 * torch.log10((made / loudest).clamp(min=10 ** (-_RANGE / 10)))


@cache
def _bands(size: int) -> Tensor:
    """Weights of a Fourier transform's bins in bands on the mel scale, triangles no narrower than a bin."""
    bins = torch.arange(size // 2 + 1) * SAMPLE_RATE / size
    edges = torch.linspace(_mel(SAMPLE_RATE / 2), _mel(_LOWEST), _ROWS + 1)
    centers = 700 * (10 ** ((edges[1:] + edges[:-1]) / 2 / 2595) - 1)
    widths = torch.gradient(centers)[0].abs().clamp(min=SAMPLE_RATE / size)
    weights = (1 - (bins - centers[:, None]).abs() / widths[:, None]).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def _draw(samples: Tensor, field: int, path: Path) -> None:
    from PIL import Image

    levels = (255 * (1 + spectrogram(samples, field) / _RANGE)).round().to(torch.uint8)
    picture = Image.fromarray(levels.numpy())
    picture.putpalette(_colours())
    picture.save(path)


@cache
def _colours() -> bytes:
    """256 colors, dark to bright."""
    try:
        from matplotlib import colormaps
        from PIL import Image  # noqa: F401
    except ImportError:
        raise CorpusError("spectrograms need matplotlib: pip install 'soundnet-port[plot]'") from None
    made: bytes = colormaps["magma"](np.arange(256), bytes=True)[:, :3].tobytes()
    return made


# ---- pages


def _write_pages(folder: Path, found: TopSounds, excerpts: Excerpts, table: bool) -> None:
    for name in ("gallery.css", "gallery.js"):
        shutil.copyfile(_PAGES / name, folder / name)
    content = found.to_dict()
    sounds = ((unit, sound) for unit in found.units for sound in unit.sounds)
    for row, (unit, sound) in zip(content["rows"], sounds, strict=True):
        row["excerpt"] = _sound_of(excerpts[sound.path, unit.layer, sound.frame])
    (folder / "units.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    if table:
        _write_table(folder / "units.parquet", content["rows"])
    if found.failures:
        write_failures(folder / "errors.tsv", found.failures)
    (folder / "index.html").write_text(_index(found, excerpts), "utf-8")
    living = [unit for unit in found.units if not unit.dead]
    for layer in found.layers:
        (folder / layer).mkdir()
    for before, unit, after in zip([None, *living], living, [*living[1:], None], strict=False):
        page = _unit_page(found, unit, before, after, excerpts)
        (folder / unit.layer / f"{unit.number}.html").write_text(page, "utf-8")


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    numbers = ("activation", "start", "peak", "end", "selectivity", "purity")
    kinds = dict.fromkeys(numbers, pyarrow.float64()) | dict.fromkeys(("unit", "rank"), pyarrow.int64())
    names = ("layer", "unit", "rank", "activation", "path", "start", "peak", "end", "label", "selectivity")
    schema = pyarrow.schema(
        [(name, kinds.get(name, pyarrow.string())) for name in (*names, "name", "purity", "excerpt")]
    )
    parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows], schema), path)


def _sound_of(excerpt: Excerpt) -> str:
    return f"sounds/{excerpt.asset}{_sound_suffix()}"


def _page(title: str, body: str, above: str = "") -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n"
        f'<link rel="icon" href="data:,">\n<link rel="stylesheet" href="{above}gallery.css">\n'
        f'<script src="{above}gallery.js" defer></script>\n</head>\n<body>\n{body}</body>\n</html>\n'
    )


def _index(found: TopSounds, excerpts: Excerpts) -> str:
    labelled = bool(found.classes)
    sorts = [("number", "number"), ("selectivity", "selectivity"), ("activation", "largest activation")]
    if labelled:
        sorts.insert(2, ("purity", "purity"))
    options = "".join(f'<option value="{key}">{text}</option>' for key, text in sorts)
    jumps = "".join(f'<a href="#{layer}">{layer}</a>' for layer in found.layers)
    classes = f", of {len(found.classes)} classes" if labelled else ""
    network = f"{found.metadata['architecture']}, weights {found.metadata['weights'][:12]}"
    failed = ""
    if found.failures:
        failed = f' {len(found.failures):,} gave nothing: <a href="errors.tsv">errors.tsv</a>.'
    sections = []
    for layer, units in groupby(found.units, lambda unit: unit.layer):
        sections.append(_section(found.layers[layer], list(units), excerpts, _about_edges(found, layer)))
    search = "class, file or number" if labelled else "file or number"
    return _page(
        "What each unit hears",
        f"""<header class="top">
<h1>What each unit hears</h1>
<p class="lead">The {found.top} sounds that drive each hidden unit most, out of {found.heard:,}\
{classes}.{failed}</p>
<p class="quiet">{html.escape(network)}. The table of all of it: <a href="units.json">units.json</a>.</p>
</header>
<div class="bar">
<nav aria-label="Layers">{jumps}</nav>
<form id="tools" role="search" hidden>
<label>Search <input type="search" id="search" placeholder="{search}" autocomplete="off"></label>
<label>Sort by <select id="sort">{options}</select></label>
<output id="count" for="search"></output>
</form>
</div>
<main>
{"".join(sections)}</main>
<footer>
{_about_units(labelled)}
</footer>
""",
    )


def _section(layer: Layer, units: Sequence[Unit], excerpts: Excerpts, edges: str) -> str:
    living, dead = [unit for unit in units if not unit.dead], [unit for unit in units if unit.dead]
    cards = "".join(_card(unit, excerpts) for unit in living)
    never = ""
    if dead:
        numbers = ", ".join(str(unit.number) for unit in dead)
        plural = "unit is" if len(dead) == 1 else "units are"
        never = f'<p class="dead">{len(dead)} {plural} never above 0 in this corpus: {numbers}.</p>\n'
    return f"""<section id="{layer.name}" aria-labelledby="{layer.name}-title">
<h2 id="{layer.name}-title">{layer.name}</h2>
<p class="quiet">{len(living)} units. Each sees {_seconds(layer.receptive_field)} of sound at a time, \
every {_seconds(layer.stride)}.{edges}</p>
<ul class="cards">
{cards}</ul>
{never}</section>
"""


def _card(unit: Unit, excerpts: Excerpts) -> str:
    pictures = "".join(
        f'<img src="pictures/{excerpts[sound.path, unit.layer, sound.frame].asset}.png" alt="" '
        f'loading="lazy" width="{_COLUMNS}" height="{_ROWS}">'
        for sound in unit.sounds[:3]
    )
    texts = {str(unit.number), *(sound.name for sound in unit.sounds)}
    texts |= {sound.label.replace("_", " ") for sound in unit.sounds if sound.label}
    words = html.escape("\n".join(sorted(texts)).lower())
    data = {
        "number": unit.number,
        "selectivity": _digits(unit.selectivity, 6),
        "activation": _digits(unit.activation, 6),
        "purity": _digits(unit.purity, 6),
    }
    attributes = " ".join(f'data-{key}="{value}"' for key, value in data.items())
    name = f'<span class="name">{html.escape(unit.name)}</span>' if unit.name else ""
    facts = []
    if unit.purity is not None:
        facts.append(_of(unit) if unit.name else f"{_of(unit)} {_plain(unit.label)}")
    if unit.selectivity is not None:
        facts.append(f"selectivity {unit.selectivity:.2f}")
    return f"""<li {attributes} data-words="{words}"><a href="{unit.layer}/{unit.number}.html">
<span class="title"><span class="number">{unit.number}</span> {name}</span>
<span class="strip">{pictures}</span>
<span class="facts">{" ".join(f"<span>{fact}</span>" for fact in facts)}</span></a></li>
"""


def _unit_page(
    found: TopSounds, unit: Unit, before: Unit | None, after: Unit | None, excerpts: Excerpts
) -> str:
    layer = found.layers[unit.layer]
    title = f"{unit.layer} unit {unit.number}"
    facts = [("largest activation", f"{unit.activation:.3g}")]
    if unit.selectivity is not None:
        facts.append(("selectivity", f"{unit.selectivity:.2f}"))
    if unit.purity is not None and unit.enrichment is not None and unit.p is not None:
        facts.append(("purity", f"{_of(unit)} {_plain(unit.label)}"))
        facts.append(("enrichment", f"{unit.enrichment:.1f} times, p = {_power(unit.p)}"))
    described = "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in facts)
    name = f'<p class="lead">{html.escape(unit.name)}</p>\n' if unit.name else ""
    figures = "".join(
        _figure(layer, unit, sound, excerpts[sound.path, unit.layer, sound.frame]) for sound in unit.sounds
    )
    return _page(
        f"{title}{f': {unit.name}' if unit.name else ''}",
        f"""<header class="top">
<nav class="steps" aria-label="Units">{_step(before, "prev", "← previous")}\
<a href="../index.html#{unit.layer}">all units</a>{_step(after, "next", "next →")}</nav>
<h1>{title}</h1>
{name}<dl class="facts">{described}</dl>
<p class="keys" hidden><label><input type="checkbox" id="keys" checked> Keys</label>
<span><kbd>n</kbd> or <kbd>→</kbd> next unit, <kbd>p</kbd> or <kbd>←</kbd> previous unit,
<kbd>space</kbd> plays and stops, <kbd>1</kbd> to <kbd>9</kbd> plays that sound</span></p>
</header>
<main>
<ol class="sounds">
{figures}</ol>
</main>
<footer>
{_about_pictures(layer, _about_edges(found, layer.name))}
{_about_units(bool(found.classes))}
</footer>
""",
        "../",
    )


def _step(unit: Unit | None, relation: str, text: str) -> str:
    if unit is None:
        return f'<span class="none">{text}</span>'
    return f'<a rel="{relation}" href="../{unit.layer}/{unit.number}.html">{text}</a>'


def _figure(layer: Layer, unit: Unit, sound: TopSound, excerpt: Excerpt) -> str:
    start, _ = window(layer, sound.frame)
    left = 100 * (sound.start - start / SAMPLE_RATE) * SAMPLE_RATE / layer.receptive_field
    wide = 100 * (sound.end - sound.start) * SAMPLE_RATE / layer.receptive_field
    name = html.escape(sound.name)
    label = f'<span class="label">{_plain(sound.label)}</span> ' if sound.label else ""
    low, high = _mel(_LOWEST), _mel(SAMPLE_RATE / 2)
    marks = "".join(
        f'<span class="pitch" style="bottom:{100 * (_mel(hertz) - low) / (high - low):.1f}%">{text}</span>'
        for hertz, text in _PITCHES.items()
    )
    seconds = f"{sound.start:.2f} to {sound.end:.2f} s"
    picture = f'../pictures/{excerpt.asset}.png" alt="Spectrogram of sound {sound.rank}"'
    return f"""<li><figure>
<div class="picture"><div class="heard" style="left:{left:.2f}%;width:{wide:.2f}%">\
<img src="{picture} width="{_COLUMNS}" height="{_ROWS}">\
<span class="playhead" hidden></span></div><div class="pitches" aria-hidden="true">{marks}</div></div>
<audio controls preload="metadata" src="../{_sound_of(excerpt)}" \
aria-label="Sound {sound.rank}, {name}, {seconds}"></audio>
{_curve(layer, unit, sound, excerpt)}
<figcaption><span class="rank">{sound.rank}</span> {label}<span class="file">{name}</span> \
<span class="quiet">{seconds}, activation {sound.activation:.3g}</span></figcaption>
</figure></li>
"""


def _curve(layer: Layer, unit: Unit, sound: TopSound, excerpt: Excerpt) -> str:
    """The unit's activation around the peak; all of a unit's curves have the same vertical scale."""
    width, height, left, right, top, bottom = 320.0, 96.0, 34.0, 8.0, 8.0, 30.0
    values = excerpt.curves[unit.number]
    center = (layer.start + layer.receptive_field / 2) / SAMPLE_RATE
    step = layer.stride / SAMPLE_RATE
    times = [center + step * (excerpt.first + number) for number in range(len(values))]
    reach = layer.receptive_field / SAMPLE_RATE
    begin, end = sound.peak - 1.5 * reach, sound.peak + 1.5 * reach

    def x(seconds: float) -> float:
        return left + (width - left - right) * (seconds - begin) / (end - begin)

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / unit.activation

    shown = [(x(time), y(value)) for time, value in zip(times, values, strict=True) if begin <= time <= end]
    line = " ".join(f"{across:.1f},{up:.1f}" for across, up in shown)
    dots = "".join(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="1.8"/>' for across, up in shown)
    base = height - bottom
    ticks = "".join(
        f'<text x="{x(seconds):.1f}" y="{base + 12:.0f}" text-anchor="middle">{_tick(seconds, reach)}</text>'
        for seconds in (begin + reach / 2, sound.peak, end - reach / 2)
    )
    alternative = f"Activation over time: {sound.activation:.3g} at {sound.peak:.2f} s"
    box = f"0 0 {width:.0f} {height:.0f}"
    return f"""<svg class="curve" viewBox="{box}" role="img" aria-label="{alternative}">
<rect class="field" x="{x(sound.peak - reach / 2):.1f}" y="{top}" width="{x(reach) - x(0):.1f}" \
height="{base - top:.1f}"/>
<path class="axis" d="M{left} {top}V{base}H{width - right}"/>
<polyline points="{line}"/>{dots}
<circle class="peak" cx="{x(sound.peak):.1f}" cy="{y(sound.activation):.1f}" r="3.6"/>
<text x="{left - 4}" y="{top + 8}" text-anchor="end">{unit.activation:.2g}</text>
<text x="{left - 4}" y="{base}" text-anchor="end">0</text>
<text x="{left + 5}" y="{top + 8}">activation</text>
{ticks}<text class="unit" x="{(left + width - right) / 2:.0f}" y="{height - 4:.0f}" \
text-anchor="middle">seconds in the file</text>
</svg>"""


def _tick(seconds: float, reach: float) -> str:
    return f"{seconds:.{1 if reach > 1 else 2 if reach > 0.1 else 4}f}".replace("-", "\N{MINUS SIGN}")


def _about_edges(found: TopSounds, layer: str) -> str:
    """A sentence on edge frames, where the layer can have any."""
    if layer not in found.edge_layers:
        return ""
    done = "count as all others do" if found.edge_frames else "are left out"
    return f" Edge frames, which hear zeros after the sound's end, {done}."


def _about_pictures(layer: Layer, edges: str) -> str:
    field = _seconds(layer.receptive_field)
    return f"""<p><strong>Pictures.</strong> Each picture is as wide as what the unit sees, {field}; hatched
is what lies outside the file. Frequency goes up on the mel scale, from {_LOWEST:.0f} to
{SAMPLE_RATE // 2:,} Hz;
color is power, over {_RANGE:.0f} dB down from the excerpt's loudest.</p>
<p><strong>Curves.</strong> The unit's activation after ReLU, a dot for each frame at the center of what the
frame sees; the band is what the frame at the peak sees, and that is what is played. All curves of a unit have
the same scale. Near a file's ends a frame also sees padding, so its center may lie outside the file.
{edges}</p>"""


def _about_units(labelled: bool) -> str:
    classes = """
<p><strong>Purity</strong> is the share of the most frequent class among a unit's sounds,
<strong>enrichment</strong> that share divided by the class's share in the corpus; p is the probability of so
many or more by chance (hypergeometric, not corrected for the number of units). A unit is named after a class
that more than half of its sounds belong to.</p>"""
    return f"""<p><strong>Selectivity</strong> is the lifetime sparseness of a unit's largest activations in
all sounds (Vinje and Gallant, <cite>Science</cite> 287, 2000): 0 for a unit that answers all sounds alike,
1 for one that answers a single sound.</p>{classes if labelled else ""}"""


def _plain(label: str | None) -> str:
    return html.escape((label or "").replace("_", " "))


def _power(value: float) -> str:
    digits, _, exponent = f"{value:.1e}".partition("e")
    return (
        f"{value:.2f}" if value >= 0.01 else f"{digits} &times; 10<sup>\N{MINUS SIGN}{-int(exponent)}</sup>"
    )


def _of(unit: Unit) -> str:
    count = len(unit.sounds)
    return f"{round((unit.purity or 0) * count)} of {count}"


def _digits(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _seconds(samples: int) -> str:
    seconds = samples / SAMPLE_RATE
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"
