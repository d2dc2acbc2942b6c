"""The web application of `serve`: a page, and the API that it uses (extra `[web]`).

GET    /network                          the network's names, layers and limits
GET    /example.wav                      a sound to try
POST   /sounds?name=NAME                 send a file; {"id": ID}
GET    /sounds/ID?first_frame=N          state and results so far; lists of frames only from N on
GET    /sounds/ID/activations?layer=L    a layer's units over time; &order=mean, peak or similarity
GET    /sounds/ID/spectrogram
GET    /sounds/ID/results.json, .csv     as `predict` prints them
GET    /sounds/ID/picture.png, sound.wav
DELETE /sounds/ID

and /live, for a microphone: see live_routes.py.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import io
import re
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import anyio
import soundfile
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from soundnet_port.audio.examples import medley
from soundnet_port.audio.loading import AudioError
from soundnet_port.inference.prediction_formats import format_prediction
from soundnet_port.network.architecture import FULL_SCALE, SAMPLE_RATE
from soundnet_port.network.categories import category_name, readable_name
from soundnet_port.network.model import SoundNet
from soundnet_port.network.weights import checksum, cpu_state_dict
from soundnet_port.viewing import session_store
from soundnet_port.viewing.activation_maps import ORDERS
from soundnet_port.viewing.live_routes import LiveHandlers
from soundnet_port.viewing.request_guard import RequestGuard
from soundnet_port.viewing.session import SessionClosed, SoundSession
from soundnet_port.viewing.session_store import SessionStore

if TYPE_CHECKING:
    from importlib.abc import Traversable

_RESPONSE_THREADS = 8  # each has memory of its own
_PAGES = importlib.resources.files("soundnet_port.viewing").joinpath("pages/serve")
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_CLOSED = "This sound is no longer on the server. Load it again."


def create_app(
    model: SoundNet,
    *,
    max_megabytes: int = 500,
    max_hours: float = 6.0,
    edge_frames: bool = False,
    allowed_hosts: frozenset[str] | None = None,
) -> Any:
    """Create the ASGI application; its temporary folder lives as long as its lifespan.

    Args:
        model: any SoundNet. Without heads, only waveform and layers are shown.
        max_megabytes: of a file.
        max_hours: of a sound.
        edge_frames: keep edge frames, and repeat short clips as the original does; see `predict`.
        allowed_hosts: names that requests may be for; None allows all.
    """
    handlers = _Handlers(model, max_megabytes, max_hours, edge_frames, local=allowed_hosts is not None)
    sound = "/sounds/{id}"
    return Starlette(
        routes=[
            Route("/", partial(_get_file, _PAGES.joinpath("serve.html"))),
            *(Route(f"/{file.name}", partial(_get_file, file)) for file in _PAGES.iterdir()),
            Route("/network", handlers.get_network),
            Route("/example.wav", handlers.get_example),
            Route("/sounds", handlers.receive_sound, methods=["POST"]),
            Route(sound, handlers.delete_sound, methods=["DELETE"]),
            Route(sound, handlers.get_results),
            Route(f"{sound}/activations", handlers.get_activations),
            Route(f"{sound}/spectrogram", handlers.get_spectrogram),
            Route(f"{sound}/results.json", handlers.get_json),
            Route(f"{sound}/results.csv", handlers.get_csv),
            Route(f"{sound}/picture.png", handlers.get_picture),
            Route(f"{sound}/sound.wav", handlers.get_wav),
            *handlers.live.routes(),
        ],
        middleware=[Middleware(RequestGuard, allowed_hosts=allowed_hosts)],
        exception_handlers={HTTPException: _respond_to_error, SessionClosed: _respond_to_closed},
        lifespan=handlers.lifespan,
    )


class _Handlers:
    """Request handlers, and the sessions they share."""

    _sessions: SessionStore  # during the lifespan

    def __init__(
        self, model: SoundNet, max_megabytes: int, max_hours: float, edge_frames: bool, local: bool
    ) -> None:
        self._model = model
        self._max_megabytes, self._max_hours = max_megabytes, max_hours
        self._edge_frames, self._local = edge_frames, local
        self._description = _describe_network(model)
        self.live = LiveHandlers(model, edge_frames)

    @asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        with tempfile.TemporaryDirectory(prefix="soundnet-port-") as folder:
            anyio.to_thread.current_default_thread_limiter().total_tokens = _RESPONSE_THREADS
            self._sessions = SessionStore(self._model, Path(folder), self._edge_frames, self._max_hours)
            self.live.start()
            closing = asyncio.create_task(self._close_idle_sessions())
            try:
                yield
            finally:
                closing.cancel()
                self.live.shut_down()
                self._sessions.shut_down()

    async def _close_idle_sessions(self) -> None:
        while True:
            await asyncio.sleep(session_store.IDLE_SECONDS / 20)
            self._sessions.close_idle()
            self.live.close_idle()

    def _get_session(self, request: Request) -> SoundSession:
        session = self._sessions.get(request.path_params["id"])
        if session is None:
            raise SessionClosed
        return session

    def _get_finished(self, request: Request) -> SoundSession:
        """Return a session whose results are complete, with categories."""
        session = self._get_session(request)
        if session.state != "done":
            raise HTTPException(409, session.error or "The sound is still being analyzed.")
        if not self._model.architecture.output_sizes:
            raise HTTPException(409, "This network has no heads, so it cannot name sounds.")
        return session

    async def receive_sound(self, request: Request) -> Response:
        limit = self._max_megabytes * 1_000_000
        too_large = HTTPException(
            413, f"The file is larger than {self._max_megabytes:,} MB, the limit of this server."
        )
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large
        name = re.split(r"[/\\]", request.query_params.get("name", ""))[-1]
        name = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)[
            -200:
        ]
        session = self._sessions.create(name or "sound")
        if session is None:
            raise HTTPException(503, "The server has too many sounds. Try again in some minutes.")
        size = 0
        try:
            with open(session.path, "wb") as file:
                async for chunk in request.stream():
                    session.touch()
                    size += len(chunk)
                    if size > limit:
                        raise too_large
                    file.write(chunk)
        except BaseException as error:
            self._sessions.close(session.id)
            if isinstance(error, ClientDisconnect):
                return Response(status_code=400)  # nobody reads it
            if isinstance(error, OSError):
                raise HTTPException(507, f"The file cannot be stored: {error.strerror or error}.") from None
            raise
        if session.closed:
            raise HTTPException(408, "The file arrived too slowly.")
        self._sessions.analyze(session)
        return JSONResponse({"id": session.id}, 201)

    def delete_sound(self, request: Request) -> Response:
        self._sessions.close(self._get_session(request).id)
        return Response(status_code=204)

    def get_results(self, request: Request) -> Response:
        session = self._get_session(request)
        first = request.query_params.get("first_frame", "")
        results = session.to_dict(int(first) if re.fullmatch(r"\d{1,9}", first) else 0)
        return JSONResponse(results | {"ahead": self._sessions.count_ahead(session)})

    def get_activations(self, request: Request) -> Response:
        name = request.query_params.get("layer", "")
        layer = self._model.architecture.layers.get(name)
        if layer is None or layer.kind == "head":
            raise HTTPException(404, f"There is no layer {name!r}.")
        order = request.query_params.get("order", "number")
        if order not in ("number", *ORDERS):
            raise HTTPException(404, f"There is no order {order!r}.")
        return JSONResponse(self._get_session(request).get_map(name, order))

    def get_spectrogram(self, request: Request) -> Response:
        return JSONResponse(self._get_session(request).get_spectrogram())

    def get_json(self, request: Request) -> Response:
        return self._format(request, "json", "application/json")

    def get_csv(self, request: Request) -> Response:
        return self._format(request, "csv", "text/csv")

    def _format(self, request: Request, file_format: str, media_type: str) -> Response:
        session = self._get_finished(request)
        text = format_prediction(session.predict(), file_format, session.name, over_time=True)
        headers = _attachment(f"{session.name}.{file_format}")
        return Response(text, media_type=media_type, headers=headers)

    def get_picture(self, request: Request) -> Response:
        session = self._get_finished(request)
        return FileResponse(session.write_picture(), headers=_attachment(f"{session.name}.png"))

    def get_wav(self, request: Request) -> Response:
        session = self._get_session(request)
        if session.state == "failed":
            raise HTTPException(409, session.error)
        try:
            return FileResponse(session.write_wav(), media_type="audio/wav")
        except AudioError as error:
            raise HTTPException(422, session.describe_error(error)) from None

    def get_network(self, request: Request) -> Response:
        settings = {
            "max_megabytes": self._max_megabytes,
            "local": self._local,
            "edge_frames": self._edge_frames,
        }
        return JSONResponse(self._description | settings)

    def get_example(self, request: Request) -> Response:
        buffer = io.BytesIO()
        soundfile.write(buffer, medley().numpy() / FULL_SCALE, SAMPLE_RATE, format="WAV", subtype="PCM_16")
        return Response(buffer.getvalue(), media_type="audio/wav")


def _get_file(file: Traversable, request: Request) -> Response:
    """Return a file of the page. No part of a request becomes a path: its URL holds the Host header, too."""
    media_type = _MEDIA_TYPES[Path(file.name).suffix]
    return Response(file.read_bytes(), media_type=media_type, headers={"Cache-Control": "no-cache"})


def _respond_to_error(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def _respond_to_closed(request: Request, error: SessionClosed) -> Response:
    return JSONResponse({"error": _CLOSED}, 404)


def _describe_network(model: SoundNet) -> dict[str, Any]:
    """Return what the page needs to know about the network."""
    layers, heads = model.architecture.layers, model.architecture.output_sizes
    description: dict[str, Any] = {
        "name": model.architecture.name,
        "heads": {
            head: [readable_name(category_name(model.categories, head, index)) for index in range(size)]
            for head, size in heads.items()
        },
        "layers": {
            name: {
                "units": layer.channels,
                "length": layer.receptive_field / SAMPLE_RATE,  # in seconds, as step
                "step": layer.stride / SAMPLE_RATE,
            }
            for name, layer in layers.items()
            if layer.kind != "head"
        },
        "pooled": model.architecture.pooled_head is not None,
        "sha256": checksum(cpu_state_dict(model)),
    }
    if pooled_head := model.architecture.pooled_head:  # windows overlap by half
        step = pooled_head.seconds / 2
        description["frame"] = {"center": step, "step": step, "length": pooled_head.seconds}  # in seconds
    elif heads:
        layer = layers[next(iter(heads))]
        description["frame"] = {
            "center": layer.center / SAMPLE_RATE,
            "step": layer.stride / SAMPLE_RATE,
            "length": layer.receptive_field / SAMPLE_RATE,
        }
    return description


def _attachment(name: str) -> dict[str, str]:
    """Return a download's header, by RFC 6266 and 8187, for any name."""
    return {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
