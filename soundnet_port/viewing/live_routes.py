"""The part of the web application's API that is for a microphone (extra `[web]`).

POST   /live?rate=HZ      begin; {"id": ID, "windows": [SECONDS, ...], ...}
POST   /live/ID           send the next samples, one channel of 16 bits, little-endian; what is new
       ?window=SECONDS    that the answer is of
       &normalize=1       see `predict`
       &spectrogram=N     columns of the spectrogram from number N on
       &layer=L&units=N   columns of a layer from number N on
DELETE /live/ID
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from soundnet_port.network.model import SoundNet
from soundnet_port.viewing.live import LEAST, MAX_CHUNK, LiveSession, LiveStore, list_windows

_SAMPLE = np.dtype("<i2")
_PATIENCE = 10.0  # seconds for a request's samples to arrive, while the session is busy


class LiveHandlers:
    """Request handlers, and the sessions they share; only between `start` and `shut_down`."""

    _store: LiveStore

    def __init__(self, model: SoundNet, edge_frames: bool) -> None:
        self._model, self._edge_frames = model, edge_frames
        self._longest = max(list_windows(model, edge_frames))

    def routes(self) -> list[Route]:
        """Return the routes of the API."""
        return [
            Route("/live", self.begin, methods=["POST"]),
            Route("/live/{id}", self.push, methods=["POST"]),
            Route("/live/{id}", self.end, methods=["DELETE"]),
        ]

    def start(self) -> None:
        """Get ready for requests."""
        self._store = LiveStore(self._model, self._edge_frames)

    def close_idle(self) -> None:
        """See `LiveStore.close_idle`."""
        self._store.close_idle()

    def shut_down(self) -> None:
        """See `LiveStore.shut_down`."""
        self._store.shut_down()

    async def begin(self, request: Request) -> Response:
        rate = request.query_params.get("rate", "")
        if not re.fullmatch(r"\d{1,9}", rate):
            raise HTTPException(400, "rate must be the sample rate in Hz.")
        try:
            session = self._store.create(int(rate))
        except ValueError as error:
            raise HTTPException(400, f"rate: {error}.") from None
        if session is None:
            raise HTTPException(503, "The server has too many live sounds. Try again in some minutes.")
        return JSONResponse({"id": session.id} | self._store.describe(), 201)

    async def push(self, request: Request) -> Response:
        session = self._get_session(request)
        window = self._parse_window(request.query_params.get("window", f"{self._longest}"))
        normalize = request.query_params.get("normalize", "") == "1"
        layer = request.query_params.get("layer", "")
        layers = self._model.architecture.layers
        if layer and (layer not in layers or layers[layer].kind == "head"):
            raise HTTPException(404, f"There is no layer {layer!r}.")
        first_spectrum, first_column = (
            int(text) if re.fullmatch(r"\d{1,9}", text := request.query_params.get(name, "")) else None
            for name in ("spectrogram", "units")
        )
        if session.busy:  # so that samples stay in order, and no queue grows
            raise HTTPException(409, "The last samples are still being processed.")
        session.busy = True
        try:
            samples = await asyncio.wait_for(_receive_samples(request, session.rate), _PATIENCE)

            def update() -> dict[str, Any]:
                start = time.perf_counter()
                session.push(samples)
                results: dict[str, Any] = {**session.state, "answer": session.answer(window, normalize)}
                if first_spectrum is not None:
                    results["spectrogram"] = session.get_spectrogram(first_spectrum)
                if layer:
                    results["units"] = session.get_units(layer, first_column or 0)
                return results | {"computed": round(time.perf_counter() - start, 5)}

            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._store.executor, update)
        except asyncio.TimeoutError:
            raise HTTPException(408, "The samples arrived too slowly.") from None
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        finally:
            session.busy = False
            session.touch()
        return JSONResponse(results)

    async def end(self, request: Request) -> Response:
        self._store.close(self._get_session(request).id)
        return Response(status_code=204)

    def _get_session(self, request: Request) -> LiveSession:
        session = self._store.get(request.path_params["id"])
        if session is None:
            raise HTTPException(404, "This live sound is no longer on the server.")
        return session

    def _parse_window(self, text: str) -> float:
        seconds = float(text) if re.fullmatch(r"\d{1,3}(\.\d{1,6})?", text) else 0.0
        if not LEAST <= seconds <= self._longest:
            raise HTTPException(400, f"window must be {LEAST:g} to {self._longest:g} seconds.")
        return seconds


async def _receive_samples(request: Request, rate: int) -> NDArray[np.float32]:
    """Return a request's samples.

    Raises:
        HTTPException: they are too many, or not whole.
        ClientDisconnect: before the end.
    """
    limit = int(MAX_CHUNK * rate) * _SAMPLE.itemsize
    too_long = HTTPException(413, f"At most {MAX_CHUNK:g} s can be sent at once.")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_long
    if len(body) % _SAMPLE.itemsize:
        raise HTTPException(400, f"{len(body):,} bytes are no whole number of 16-bit samples.")
    samples: NDArray[np.float32] = np.frombuffer(bytes(body), _SAMPLE).astype(np.float32)
    samples *= np.float32(2.0**-15)
    return samples
