"""Keep computed features on disk, up to a size; the least recently used entries are removed.

The size is 2 GB, or what the environment variable `SOUNDNET_CACHE_SIZE` says in GB.
"""

from __future__ import annotations

import os
import re
import secrets
import zipfile
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import platformdirs
import torch
from numpy.typing import NDArray

from soundnet_port.errors import SoundNetError
from soundnet_port.network.engine import kernel_name
from soundnet_port.network.model import SoundNet
from soundnet_port.network.modules import has_hooks
from soundnet_port.network.weights import checksum, cpu_state_dict
from soundnet_port.version import __version__

Values = NDArray[np.float32]
_DEFAULT_GB = 2.0
_FILE = re.compile(r"[0-9a-f]{64}\.npz|\.[0-9a-f]{8}\.part")


class FeatureCache:
    """A folder of features with the seconds of their sound, by hexadecimal key.

    Several processes and threads may use a folder at a time.

    Args:
        folder: created with the first entry.
        limit: bytes to keep at most; by default 2 GB, or `SOUNDNET_CACHE_SIZE` GB.

    Attributes:
        write_error: why an entry could not be written; "" if all could.

    Raises:
        SoundNetError: `SOUNDNET_CACHE_SIZE` is no number.
    """

    def __init__(self, folder: Path, limit: float | None = None) -> None:
        self.folder = folder
        self.limit = _read_limit() if limit is None else limit
        self.write_error = ""
        self._size: int | None = None  # bytes in the folder, as far as this process knows
        self._lock = Lock()

    def read(self, key: str) -> tuple[Values, float] | None:
        """Return an entry; None if there is none, or it is damaged (zip files have checksums)."""
        path = self._path(key)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                features, seconds = arrays["features"], float(arrays["seconds"])
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
            return None
        with suppress(OSError):  # a folder of others
            os.utime(path)
        return features, seconds

    def write(self, key: str, features: Values, seconds: float) -> None:
        """Write an entry, and remove the least recently used ones beyond the limit."""
        if self.write_error:
            return
        path = self._path(key)
        temporary = path.with_name(f".{secrets.token_hex(4)}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:  # not synchronized: damaged entries are recomputed
                np.savez(file, features=features, seconds=np.float64(seconds))
            os.replace(temporary, path)
            with self._lock:
                if self._size is None:
                    self._size = sum(size for _, size, _ in self._list())
                else:
                    self._size += path.stat().st_size
        except OSError as error:
            self.write_error = f"{error.filename or path}: {error.strerror or error}"
            with suppress(OSError):
                temporary.unlink()
            return
        with self._lock:
            if self._size > self.limit:
                self._trim()

    def _trim(self) -> None:
        """Remove the least recently used entries; some more than needed, as listing all takes time."""
        files = sorted(self._list())
        self._size = sum(size for _, size, _ in files)
        for _, size, path in files:
            if self._size <= 0.9 * self.limit:
                break
            with suppress(OSError):  # in use (Windows)
                path.unlink(missing_ok=True)
                self._size -= size

    def _list(self) -> list[tuple[int, int, Path]]:
        """Return (time of last use, bytes, path) of the cache's own files."""
        files = []
        for path in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            with suppress(FileNotFoundError):  # removed by another process
                if _FILE.fullmatch(path.name):
                    files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        return files

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"


def describe_network(model: SoundNet) -> dict[str, Any]:
    """Return all that tells a network's features from another's, for keys."""
    parameter = next(model.parameters())
    return {
        "version": __version__,
        "weights": checksum(cpu_state_dict(model, torch.float32)),
        "dtype": str(parameter.dtype),
        "eps": [module.eps for module in model.modules() if isinstance(module, torch.nn.BatchNorm1d)],
        "kernel": kernel_name(parameter) if model.use_engine else "modules",
    }


def open_cache(cache: str | os.PathLike[str] | bool, model: SoundNet) -> FeatureCache | None:
    """Return the cache in a folder: True is one in the user's cache directory, False none.

    There is none for a network with hooks, since they may change anything.
    """
    if any(has_hooks(module) for module in model.modules()):
        return None
    if isinstance(cache, bool):
        folder = platformdirs.user_cache_path("soundnet-port", appauthor=False) / "evaluate"
        return FeatureCache(folder) if cache else None
    return FeatureCache(Path(cache).expanduser())


def _read_limit() -> float:
    text = os.environ.get("SOUNDNET_CACHE_SIZE", "")
    try:
        gigabytes = float(text or _DEFAULT_GB)
        if not gigabytes >= 0:
            raise ValueError
    except ValueError:
        raise SoundNetError(f"SOUNDNET_CACHE_SIZE: {text!r} is no size; give a number of GB") from None
    return gigabytes * 1e9
