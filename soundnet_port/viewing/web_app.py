"""A page in the browser that shows what the network hears, and the server behind it (extra `[web]`).

A sound that the page sends becomes a file in a temporary folder of the server. One of a few threads goes
through it once, in blocks, and what has been heard so far can be asked for at any time. However long the
sound is, only this is kept of it: the logits of the heads, 25 MB for an hour of both at most, and waveform
and layers as maxima over equal stretches of time, `_COLUMNS` of them or fewer.
"""

from __future__ import annotations

import asyncio
import base64
import csv
import importlib.resources
import importlib.util
import io
import ipaddress
import math
import re
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import soundfile
import torch
from torch import Tensor

from soundnet_port.audio.examples import medley
from soundnet_port.audio.finding import SUFFIXES
from soundnet_port.audio.loading import AudioError, open_sound
from soundnet_port.audio.loudness import QUIET, LevelMeter
from soundnet_port.errors import MissingExtraError
from soundnet_port.files import atomic_write
from soundnet_port.inference.activations import LayerActivations
from soundnet_port.inference.prediction import Prediction, build_prediction, min_samples
from soundnet_port.network.architecture import CLASSES, FULL_SCALE, SAMPLE_RATE, Architecture
from soundnet_port.network.categories import label, readable
from soundnet_port.network.model import SoundNet
from soundnet_port.network.streaming import Stream, stream
from soundnet_port.viewing.plots import prediction_figure, write_figure

try:
    import anyio
    import uvicorn
    from starlette.applications import Starlette
    from starlette.datastructures import Headers, MutableHeaders
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise MissingExtraError(str(error.name).partition(".")[0], "web") from None

_BLOCK = 1 << 18  # samples at a time, 12 s
_COLUMNS = 1500
_FRAMES = 1024  # for which there is room at first; an hour has 1,209
_WORKERS = 2  # threads that listen
_ANSWERING = 8  # threads; each has memory of its own
_TOP = 10  # categories of the clip and of a frame
_ROWS = 5  # of the clip's, that are drawn over time; and as many of frames' best
_SOUNDS = 50  # at a time
_IDLE = 600  # seconds without a request, after which a sound is removed
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PAGE = {"/": "serve.html", "/serve.css": "serve.css", "/serve.js": "serve.js"}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


class Columns:
    """Maxima over equal stretches of time, at most so many: where these run out, two become one.

    Attributes:
        width: frames in a column; the last one may still have fewer.
    """

    def __init__(self, channels: int, most: int = _COLUMNS) -> None:
        self.width = 1
        self._room = np.zeros((channels, most), np.float32)  # all of it at once keeps the heap in order
        self._frames = 0

    @property
    def values(self) -> np.ndarray:
        """`(channels, columns)`."""
        return self._room[:, : math.ceil(self._frames / self.width)]

    def add(self, frames: np.ndarray) -> None:
        """More frames, `(channels, frames)`."""
        if not frames.shape[1]:
            return
        total = self._frames + frames.shape[1]
        while total > self._room.shape[1] * self.width:
            values = self.values
            if values.size:
                halved = np.maximum.reduceat(values, np.arange(0, values.shape[1], 2), axis=1)
                self._room[:, : halved.shape[1]] = halved
            self.width *= 2
        columns = np.arange(self._frames, total) // self.width
        first = int(columns[0])
        new = np.maximum.reduceat(frames, np.flatnonzero(np.diff(columns, prepend=-1)), axis=1)
        if first < self.values.shape[1]:  # the last column goes on
            new[:, 0] = np.maximum(new[:, 0], self._room[:, first])
        self._room[:, first : first + new.shape[1]] = new
        self._frames = total


class Named:
    """What a head has said so far."""

    def __init__(self, categories: int, own: bool) -> None:
        self._own = own  # classes are averaged before the softmax, see Prediction.classes
        self._room = torch.from_numpy(np.zeros((_FRAMES, categories), np.float32))  # no memory until used
        self._norms = torch.zeros(_FRAMES)  # of each frame, the log of the sum of its exponentials
        self._sum = torch.zeros(categories, dtype=torch.float64)
        self._tops: list[list[float]] = []
        self._best: dict[int, float] = {}

    @property
    def logits(self) -> Tensor:
        """Of all frames, `(frames, categories)`."""
        return self._room[: len(self._tops)]

    def add(self, logits: Tensor) -> None:
        """More frames, `(frames, categories)`."""
        before, after = len(self._tops), len(self._tops) + len(logits)
        while after > len(self._norms):
            self._room = torch.cat([self._room, torch.zeros_like(self._room)])
            self._norms = torch.cat([self._norms, torch.zeros_like(self._norms)])
        self._room[before:after] = logits
        norms = torch.logsumexp(logits, 1)
        self._norms[before:after] = norms
        probabilities = (logits - norms[:, None]).exp()
        self._sum += (logits if self._own else probabilities).double().sum(0)
        values, indices = probabilities.topk(min(_TOP, logits.shape[1]))
        for each, which in zip(values.tolist(), indices.tolist(), strict=True):
            self._tops.append([x for pair in zip(which, map(_short, each), strict=True) for x in pair])
            self._best[which[0]] = max(each[0], self._best.get(which[0], 0.0))

    def view(self, since: int) -> dict[str, Any]:
        """The clip's list; rows of categories with each frame's probability; frames from `since` on."""
        if not self._tops:
            return {"clip": [], "rows": [], "tops": []}
        mean = self._sum / len(self._tops)
        values, indices = (mean.softmax(0) if self._own else mean).topk(min(_TOP, len(mean)))
        clip = list(zip(indices.tolist(), map(_short, values.tolist()), strict=True))
        rows = [index for index, _ in clip[:_ROWS]]
        others = sorted(self._best.keys() - set(rows), key=lambda index: -self._best[index])
        rows += others[:_ROWS]
        tracks = (self.logits[:, rows] - self._norms[: len(self._tops), None]).exp().T.tolist()
        return {
            "clip": clip,
            "rows": [[index, list(map(_short, track))] for index, track in zip(rows, tracks, strict=True)],
            "tops": self._tops[since:],
        }


class Sound:
    """A sound that was sent: its file, and what has been heard of it so far.

    Attributes:
        folder: its own.
        path: of the file as it came.
        name: that it has for the user; never part of a path.
        state: "sending", "waiting", "computing", "done" or "failed".
        asked: when it was last asked for, by time.monotonic().
        gone: nobody wants it any more.
        edge_frames: whether edge frames (see `SoundNet.edge_frames`) are kept.
    """

    def __init__(self, model: SoundNet, folder: Path, name: str, edge_frames: bool = False) -> None:
        self.model, self.folder, self.name, self.edge_frames = model, folder, name, edge_frames
        suffix = Path(name).suffix.lower()
        self.path = folder / f"sound{suffix if suffix in SUFFIXES else ''}"
        self.state, self.error, self.gone = "sending", "", False
        self.asked = time.monotonic()
        self.listening: Future[None] | None = None
        self._samples, self._repeats = 0, 1
        self._said: float | None = None
        self._decoder: str | None = None
        self._outline = Columns(2)
        self._meter = LevelMeter()
        architecture = model.architecture
        self._least = min_samples(model, edge_frames)
        self._layers = {
            name: architecture.layers[_drawn_from(architecture, name, self._least)]
            for name, layer in architecture.layers.items()
            if layer.kind != "head"
        }
        self._columns = {each.name: Columns(each.channels) for each in self._layers.values()}
        self._largest = dict.fromkeys(self._columns, 0.0)  # without edge frames, which would hide all else
        self._edges: dict[str, int] = {}  # edge frames of each layer, once the sound has ended
        self._heats: dict[str, dict[str, Any]] = {}
        self._heads = {head: Named(size, head == CLASSES) for head, size in architecture.head_sizes.items()}
        self._changing, self._making = Lock(), Lock()

    @property
    def prediction(self) -> Prediction:
        """What `predict` gives for it. Its state must be "done", and the network have heads."""
        logits: dict[str | int, Tensor] = {head: each.logits for head, each in self._heads.items()}
        clip = LayerActivations(logits, self._samples, self._repeats, self._decoder, self._meter.level)
        return build_prediction(self.model, clip, _TOP, self.edge_frames)

    def listen(self, hours: float) -> None:
        """Goes through the file; for a thread of its own."""
        try:
            self.state = "computing"
            self._listen(hours)
            with self._changing:
                self._heats = {layer: self._heat(layer) for layer in self._columns}
                self._columns.clear()
                self.state = "done"
        except _Gone:
            pass
        except AudioError as error:  # whatever is raised while the file is open has become one
            self.error = str(error).replace(str(self.path), self.name)
        except Exception as error:  # the server goes on
            self.error = f"{self.name}: could not be computed ({type(error).__name__}: {error})"
            print(f"soundnet-port: {self.error}", file=sys.stderr, flush=True)
        finally:
            if self.state != "done":
                self.error = self.error or "cancelled"
                self.state = "failed"

    def _listen(self, hours: float) -> None:
        too_long = ValueError(f"longer than {hours:g} hours, the longest that is taken here")
        listening = self.listening_to()
        with open_sound(self.path) as opened:
            self._said, self._decoder = opened.seconds, opened.decoder
            if (opened.seconds or 0) > hours * 3600:
                raise too_long
            for block in chain(opened.blocks(max(_BLOCK, self._least)), [None]):
                if self.gone:
                    raise _Gone
                if block is None:
                    new = listening.finish()
                else:
                    if not self._samples and len(block) < self._least:
                        self._repeats = math.ceil(self._least / len(block))
                    new = listening.push(block.repeat(self._repeats))
                with self._changing:
                    if block is not None:
                        self._samples += len(block)
                        self._meter.add(block)
                        self._outline.add(torch.stack([block, -block]).numpy())
                    self._edges = listening.edge_frames
                    for layer, frames in new.items():
                        self._add(layer, frames[0].float().cpu())
                if self._samples > hours * 3600 * SAMPLE_RATE:
                    raise too_long

    def _add(self, layer: str, frames: Tensor) -> None:
        """Take in a layer's next frames, `(channels, frames)`; edge frames only if they are kept."""
        ordinary = frames[:, : frames.shape[1] - self._edges[layer]]
        kept = frames if self.edge_frames else ordinary
        if layer in self._heads:
            self._heads[layer].add(kept.T)
        else:
            self._columns[layer].add(kept.numpy())
            if ordinary.shape[1]:
                self._largest[layer] = max(self._largest[layer], float(ordinary.max()))

    def listening_to(self) -> Stream[str]:
        """What gives the frames of all that is kept."""
        return stream(self.model, [*self._columns, *self._heads])

    def view(self, since: int) -> dict[str, Any]:
        """What the page draws, as plain lists; of each frame's lists those from frame `since` on."""
        with self._changing:
            high, low = (np.round(self._outline.values / FULL_SCALE, 3) + 0.0).tolist()
            return {
                "name": self.name,
                "state": self.state,
                "error": self.error,
                "seconds": self._samples / SAMPLE_RATE,
                "total": self._said,
                "repeats": self._repeats,
                "edges": max((self._edges.get(head, 0) for head in self._heads), default=0),
                "quiet": self.state == "done" and self._meter.level < QUIET,
                "outline": {"step": self._outline.width / SAMPLE_RATE, "high": high, "low": low},
                "heads": {head: each.view(since) for head, each in self._heads.items()},
            }

    def heat(self, layer: str) -> dict[str, Any]:
        """A layer's units over time: the square roots of their maxima, 255 the layer's largest.

        The largest of frames that are no edge frames: where these are kept, they are drawn as 255.
        """
        with self._changing:
            drawn = self._layers[layer].name
            return (self._heats.get(drawn) or self._heat(drawn)) | {"edges": self._edges.get(drawn, 0)}

    def _heat(self, name: str) -> dict[str, Any]:
        layer, columns = self._layers[name], self._columns[name]
        largest = self._largest[name]
        shown = np.round(255 * np.sqrt(np.clip(columns.values / (largest or 1), 0, 1)))
        return {
            "units": layer.channels,
            "columns": columns.values.shape[1],
            "first": (layer.start + layer.receptive_field / 2 - layer.stride / 2) / SAMPLE_RATE,
            "step": columns.width * layer.stride / SAMPLE_RATE,
            "largest": largest,
            "values": base64.b64encode(shown.astype(np.uint8).tobytes()).decode(),  # (units, columns)
        }

    def wav(self) -> Path:
        """The sound as the network hears it, for browsers that cannot play the file."""
        made = self.folder / "heard.wav"
        with self._making:
            if not made.exists():
                with (
                    atomic_write(made) as aside,
                    open_sound(self.path) as opened,
                    soundfile.SoundFile(aside, "w", SAMPLE_RATE, 1, "PCM_16", format="WAV") as file,
                ):
                    for block in opened.blocks(_BLOCK):
                        file.write(block.numpy() / FULL_SCALE)
        return self._there(made)

    def picture(self) -> Path:
        """Waveform and categories over time, by matplotlib."""
        made = self.folder / "picture.png"
        with self._making:
            if not made.exists():
                outline = torch.from_numpy(np.stack([-self._outline.values[1], self._outline.values[0]]))
                write_figure(prediction_figure(self.prediction, outline, self.name), made)
        return self._there(made)

    def _there(self, made: Path) -> Path:
        if self.gone:  # while it was made
            shutil.rmtree(self.folder, ignore_errors=True)
            raise HTTPException(404)
        return made


def _drawn_from(architecture: Architecture, name: str, least: int) -> str:
    """The layer whose maxima are the same: its pooling, if a column is never narrower than what that pools.

    So the engine need not give the frames before pooling, which are most of its work for all layers.
    """
    for block in architecture.blocks:
        if block.name == name and block.pool:
            columns = least / architecture.layers[name].stride / (block.pool / 2)
            return block.pooled if columns > _COLUMNS + 1 else name
    return name


class _Gone(Exception):
    """Nobody wants the sound any more."""


def make_app(
    model: SoundNet,
    *,
    megabytes: int = 500,
    hours: float = 6.0,
    edge_frames: bool = False,
    hosts: frozenset[str] | None = None,
) -> Any:
    """The server, an ASGI application; its temporary folder lives as long as its lifespan.

    Args:
        model: any SoundNet. Without heads there are waveform and layers only.
        megabytes: of a file at most.
        hours: of sound at most.
        edge_frames: keep edge frames, and repeat short clips, as the original; see `predict`.
        hosts: names that requests may be for; None takes any.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "web")
    sounds: dict[str, Sound] = {}
    folder = Path()  # of the lifespan, as is the pool
    pool: ThreadPoolExecutor

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        nonlocal folder, pool
        threads = max(1, torch.get_num_threads() // _WORKERS)
        with tempfile.TemporaryDirectory(prefix="soundnet-port-") as temporary:
            folder = Path(temporary)
            anyio.to_thread.current_default_thread_limiter().total_tokens = _ANSWERING
            pool = ThreadPoolExecutor(_WORKERS, "listen", torch.set_num_threads, (threads,))
            pool.submit(warm_up).result()
            removing = asyncio.create_task(remove_idle())
            try:
                yield
            finally:
                removing.cancel()
                for sound_id in list(sounds):
                    remove(sound_id)
                pool.shutdown(cancel_futures=True)

    def warm_up() -> None:
        """The engine folds its weights on first use: let that be before the first sound, and once."""
        Sound(model, folder, "").listening_to().push(torch.zeros(min_samples(model)))

    async def remove_idle() -> None:
        while True:
            await asyncio.sleep(_IDLE / 20)
            for sound_id, sound in list(sounds.items()):
                if time.monotonic() - sound.asked > _IDLE:
                    remove(sound_id)

    def remove(sound_id: str) -> None:
        sound = sounds.pop(sound_id, None)
        if sound is None:
            return
        sound.gone = True
        if sound.listening and not sound.listening.cancel():
            sound.listening.add_done_callback(lambda _: shutil.rmtree(sound.folder, ignore_errors=True))
        else:
            shutil.rmtree(sound.folder, ignore_errors=True)

    def sound_of(request: Request) -> Sound:
        sound = sounds.get(request.path_params["sound"])
        if sound is None:
            raise HTTPException(404, "This sound is not here any more. Load it again.")
        sound.asked = time.monotonic()
        return sound

    def done(request: Request) -> Sound:
        sound = sound_of(request)
        if sound.state != "done":
            raise HTTPException(409, sound.error or "Not everything has been heard yet.")
        if not model.architecture.heads:
            raise HTTPException(409, "These weights have no heads, they cannot name sounds.")
        return sound

    async def receive(request: Request) -> Response:
        too_large = HTTPException(
            413, f"The file is larger than {megabytes:,} MB, the most that is taken here."
        )
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > megabytes * 1_000_000:
            raise too_large
        if len(sounds) >= _SOUNDS:
            raise HTTPException(503, "Too many sounds are here at the moment. Try again in some minutes.")
        name = re.split(r"[/\\]", request.query_params.get("name", ""))[-1]
        name = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in name)[-200:]
        sound_id = secrets.token_urlsafe(24)
        sounds[sound_id] = sound = Sound(model, folder / sound_id, name or "sound", edge_frames)
        sound.folder.mkdir()
        size = 0
        try:
            with open(sound.path, "wb") as file:
                async for chunk in request.stream():
                    sound.asked = time.monotonic()
                    size += len(chunk)
                    if size > megabytes * 1_000_000:
                        raise too_large
                    file.write(chunk)
        except BaseException as error:
            remove(sound_id)
            if isinstance(error, ClientDisconnect):
                return Response(status_code=400)  # nobody is there to read it
            if isinstance(error, OSError):
                raise HTTPException(507, f"The file cannot be kept: {error.strerror or error}.") from None
            raise
        if sound.gone:
            raise HTTPException(408, "The sound came too slowly.")
        sound.state = "waiting"
        sound.listening = pool.submit(sound.listen, hours)
        return JSONResponse({"id": sound_id}, 201)

    def view(request: Request) -> Response:
        sound = sound_of(request)
        since = request.query_params.get("since", "")
        waiting = [each for each in list(sounds.values()) if each.state == "waiting"]
        ahead = waiting.index(sound) if sound in waiting else 0
        known = int(since) if re.fullmatch(r"\d{1,9}", since) else 0
        return JSONResponse(sound.view(known) | {"ahead": ahead})

    def heat(request: Request) -> Response:
        layer = request.query_params.get("layer", "")
        known = model.architecture.layers.get(layer)
        if known is None or known.kind == "head":
            raise HTTPException(404, f"There is no layer {layer!r}.")
        return JSONResponse(sound_of(request).heat(layer))

    def results_json(request: Request) -> Response:
        sound = done(request)
        return JSONResponse(
            {"file": sound.name} | sound.prediction.to_dict(), headers=_attached(f"{sound.name}.json")
        )

    def results_csv(request: Request) -> Response:
        sound, text = done(request), io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["start", "end", "head", "rank", "index", "label", "probability"])
        writer.writerows(sound.prediction.to_rows())
        return Response(text.getvalue(), media_type="text/csv", headers=_attached(f"{sound.name}.csv"))

    def picture(request: Request) -> Response:
        sound = done(request)
        return FileResponse(sound.picture(), headers=_attached(f"{sound.name}.png"))

    def wav(request: Request) -> Response:
        sound = sound_of(request)
        if sound.state == "failed":
            raise HTTPException(409, sound.error)
        try:
            return FileResponse(sound.wav(), media_type="audio/wav")
        except AudioError as error:
            raise HTTPException(422, str(error).replace(str(sound.path), sound.name)) from None

    def forget(request: Request) -> Response:
        sound_of(request)
        remove(request.path_params["sound"])
        return Response(status_code=204)

    def network(request: Request) -> Response:
        settings = {"megabytes": megabytes, "local": hosts is not None, "edge_frames": edge_frames}
        return JSONResponse(_described(model) | settings)

    def example(request: Request) -> Response:
        text = io.BytesIO()
        soundfile.write(text, medley().numpy() / FULL_SCALE, SAMPLE_RATE, format="WAV", subtype="PCM_16")
        return Response(text.getvalue(), media_type="audio/wav")

    def page(request: Request) -> Response:
        name = _PAGE[request.url.path]
        content = importlib.resources.files("soundnet_port.viewing").joinpath(f"pages/{name}").read_bytes()
        return Response(content, media_type=_TYPES[Path(name).suffix], headers={"Cache-Control": "no-cache"})

    def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

    routes = [Route(path, page) for path in _PAGE]
    routes += [
        Route("/network", network),
        Route("/example.wav", example),
        Route("/sounds", receive, methods=["POST"]),
        Route("/sounds/{sound}", forget, methods=["DELETE"]),
        Route("/sounds/{sound}", view),
        Route("/sounds/{sound}/heat", heat),
        Route("/sounds/{sound}/results.json", results_json),
        Route("/sounds/{sound}/results.csv", results_csv),
        Route("/sounds/{sound}/picture.png", picture),
        Route("/sounds/{sound}/sound.wav", wav),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(_Guard, hosts=hosts)],
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
    )


class _Guard:
    """Refuses what a page from elsewhere might ask in the user's name; says what the page may do."""

    def __init__(self, app: Any, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        foreign = origin is not None and _netloc(origin) != host
        answer = self.app
        if self.hosts is not None and re.sub(r":\d*$", "", host) not in self.hosts:
            # a name that its owner has pointed at this machine (DNS rebinding)
            answer = JSONResponse({"error": "This server has another name."}, 421)
        elif foreign and scope["method"] not in ("GET", "HEAD"):
            answer = JSONResponse({"error": "Another site's pages may not do this."}, 403)
        await answer(scope, receive, guarded)


def _netloc(origin: str) -> str | None:
    with suppress(ValueError):
        return urlsplit(origin).netloc.lower()
    return None


def _described(model: SoundNet) -> dict[str, Any]:
    """What the page has to know of the network."""
    architecture = model.architecture
    layers = architecture.layers
    heads = architecture.head_sizes
    described: dict[str, Any] = {
        "name": architecture.name,
        "heads": {
            head: [readable(label(model.categories, head, index)) for index in range(size)]
            for head, size in heads.items()
        },
        "layers": {name: layer.channels for name, layer in layers.items() if layer.kind != "head"},
    }
    if heads:
        layer = layers[next(iter(heads))]
        described["frame"] = {
            "center": (layer.start + layer.receptive_field / 2) / SAMPLE_RATE,
            "step": layer.stride / SAMPLE_RATE,
            "hears": layer.receptive_field / SAMPLE_RATE,
        }
    return described


def _attached(name: str) -> dict[str, str]:
    """A download's header, by RFC 6266 and 8187, for any name."""
    return {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}


def _short(probability: float) -> float:
    return round(probability, 4)


def serve(
    model: SoundNet,
    host: str = "127.0.0.1",
    port: int = 8765,
    *,
    megabytes: int = 500,
    hours: float = 6.0,
    edge_frames: bool = False,
    ready: Callable[[str], None] = print,
) -> None:
    """Serves the page until the process is told to end.

    Args:
        host: address or name to listen on. Requests must be for it while it is this computer alone.
        port: 0 takes a free one.
        megabytes, hours, edge_frames: see `make_app`.
        ready: called with the page's address once connections are taken.

    Raises:
        OSError: nothing can listen there.
        MissingExtraError: matplotlib is not installed.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    local = ipaddress.ip_address(address[0]).is_loopback
    hosts = frozenset({"127.0.0.1", "localhost", "[::1]", host.lower()}) if local else None
    with socket.socket(family, kind) as listening:
        if sys.platform != "win32":  # there it would let several listen
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(100)
        app = make_app(model, megabytes=megabytes, hours=hours, edge_frames=edge_frames, hosts=hosts)
        name = f"[{host}]" if ":" in host else host
        ready(f"http://{name}:{listening.getsockname()[1]}/")
        config = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        uvicorn.Server(config).run(sockets=[listening])
