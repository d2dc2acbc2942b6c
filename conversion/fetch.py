"""Gets MIT's released networks and converts them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from soundnet_port.conversion.convert import Refused, Report, convert
from soundnet_port.conversion.t7 import T7Error, members, open_t7
from soundnet_port.weights import RELEASED_URL

TIMEOUT = 30  # seconds without a byte


def fetch(
    url: str = RELEASED_URL, *, destination: str | Path | None = None, force: bool = False
) -> Iterator[Report | Refused]:
    """Downloads a zip of Torch7 networks, or takes a file, and converts all networks in it.

    The download is kept in the user's cache folder and used again; a part of one never is.

    Args:
        url: http or https address, or a path.
        destination: as for `convert`.
        force: as for `convert`.

    Yields:
        as `convert`.

    Raises:
        Refused: the download failed, or what came is not a zip with Torch7 files; then it is not kept.
    """
    if not re.match(r"https?://", url):
        yield from convert(url.removeprefix("file://"), destination, force=force)
        return
    path = downloaded(url)
    try:
        for member in members(path):
            if member is None:
                raise T7Error(0, "no zip", "a zip with Torch7 files (.t7), as MIT released it")
            with open_t7(path, member):  # whole, by its checksum
                pass
    except T7Error as error:
        path.unlink()
        raise Refused(f"{url}: {error}; the download was not kept") from None
    yield from convert(path, destination, force=force)


def downloaded(url: str) -> Path:
    """The file at `url` in the cache, downloaded if it is not there yet.

    Raises:
        Refused: it could not be had whole.
    """
    import pooch
    import requests
    import urllib3

    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{Path(url.partition('?')[0]).name or 'download'}"
    folder = platformdirs.user_cache_path("soundnet-port", appauthor=False)
    # pooch writes aside and renames when all is there; a body shorter than announced is an error
    get = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    try:
        return Path(pooch.retrieve(url, known_hash=None, fname=name, path=folder, downloader=get))
    except requests.HTTPError as error:
        answer = error.response
        reason = f"the server answered {answer.status_code} {answer.reason}" if answer is not None else "?"
    except requests.Timeout:
        reason = f"no answer for {TIMEOUT} s"
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        reason = f"the connection failed or broke off ({type(error).__name__})"
    except OSError as error:
        reason = f"cannot be written to {folder} ({error.strerror or error})"
    raise Refused(
        f"{url}: {reason}. Try again, name a mirror with --url, or download it by other means and run "
        "'soundnet-port convert soundnet_models_public.zip'"
    )
