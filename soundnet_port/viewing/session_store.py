"""The sounds that a server holds, and the threads that analyze them."""

from __future__ import annotations

import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from soundnet_port.inference.prediction import min_samples
from soundnet_port.network.model import SoundNet
from soundnet_port.viewing.session import SoundSession

MAX_SESSIONS = 50
IDLE_SECONDS = 600  # without a request, after which a sound is removed
_WORKERS = 2  # threads


class SessionStore:
    """Sessions by their ids, which cannot be guessed.

    Args:
        model: any SoundNet.
        folder: of all files; each session has its own folder there.
        edge_frames: see `SoundSession`.
        max_hours: of a sound.
    """

    def __init__(self, model: SoundNet, folder: Path, edge_frames: bool, max_hours: float) -> None:
        self._model, self._folder = model, folder
        self._edge_frames, self._max_hours = edge_frames, max_hours
        self._sessions: dict[str, SoundSession] = {}
        threads = max(1, torch.get_num_threads() // _WORKERS)
        self._executor = ThreadPoolExecutor(_WORKERS, "analyze", torch.set_num_threads, (threads,))
        self._executor.submit(self._warm_up).result()

    def create(self, name: str) -> SoundSession | None:
        """Create a session and its folder; return None if there are too many."""
        if len(self._sessions) >= MAX_SESSIONS:
            return None
        folder = self._folder / secrets.token_urlsafe(24)
        self._sessions[folder.name] = session = SoundSession(self._model, folder, name, self._edge_frames)
        folder.mkdir()
        return session

    def get(self, session_id: str) -> SoundSession | None:
        """Return a session; it then counts as recently used."""
        session = self._sessions.get(session_id)
        if session is not None:
            session.touch()
        return session

    def analyze(self, session: SoundSession) -> None:
        """Schedule the analysis of a sound that has arrived."""
        session.state = "waiting"
        session.task = self._executor.submit(session.analyze, self._max_hours)

    def count_ahead(self, session: SoundSession) -> int:
        """Return how many sounds are analyzed before this one."""
        waiting = [other for other in list(self._sessions.values()) if other.state == "waiting"]
        return waiting.index(session) if session in waiting else 0

    def close(self, session_id: str) -> None:
        """Remove a session and its files, now or when its analysis has stopped."""
        session = self._sessions.pop(session_id, None)
        if session is None:
            return
        session.closed = True
        if session.task and not session.task.cancel():
            session.task.add_done_callback(lambda _: shutil.rmtree(session.folder, ignore_errors=True))
        else:
            shutil.rmtree(session.folder, ignore_errors=True)

    def close_idle(self) -> None:
        """Close the sessions that nobody has asked for in a while."""
        for session_id, session in list(self._sessions.items()):
            if time.monotonic() - session.last_request > IDLE_SECONDS:
                self.close(session_id)

    def shut_down(self) -> None:
        """Close all sessions and wait for the threads to end."""
        for session_id in list(self._sessions):
            self.close(session_id)
        self._executor.shutdown(cancel_futures=True)

    def _warm_up(self) -> None:
        """Let the engine fold its weights, once and before the first sound."""
        session = SoundSession(self._model, self._folder, "")
        session.open_stream().push(torch.zeros(min_samples(self._model)))
