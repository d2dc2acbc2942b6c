"""The files that features of a corpus are written to: a writer, and a merger of parts, per format.

Every format but npy and torch7 comes in two kinds: a file per input, and one file for a whole corpus. The
latter is made of parts, files of the same format with some inputs each, which are put together at the
end, one array at a time. Equal content gives equal bytes: no times of day, everything in a fixed order.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.audio.finding import Failure
from soundnet_port.inference.torch7_files import save_h5

METADATA_KEY = "soundnet_port"
_MAT_HEADER = b"MATLAB 5.0 MAT-file, written by soundnet-port".ljust(116)
_ROW_GROUP = 1 << 25  # bytes of numbers in a row group of a merged parquet file


@dataclass(frozen=True)
class Contents:
    """What is in the files of a run.

    Attributes:
        widths: numbers in a row, by layer.
        pool: "none", or how the frames were pooled.
        metadata: how all of it was made.
        clock: period in seconds, and alignment, of rows that are not the network's frames.
        edge_layers: those of the layers that can have edge frames (see `SoundNet.edge_frames`).
        edge_frames: whether what is pooled, or on a clock, is made of these, too. Frames that are neither
            are all there, and the files say how many of the last ones are edge frames.
    """

    widths: Mapping[str, int]
    pool: str
    metadata: Mapping[str, Any]
    clock: tuple[float, str] | None = None
    edge_layers: tuple[str, ...] = ()
    edge_frames: bool = True

    @property
    def all_frames(self) -> bool:
        """Whether rows are the network's frames, all of them."""
        return self.pool == "none" and self.clock is None

    @property
    def timed(self) -> bool:
        """Frames have times; what is pooled has none."""
        return self.pool == "none"

    def described(self) -> str:
        return json.dumps(dict(self.metadata), sort_keys=True)


@dataclass(frozen=True)
class Features:
    """What one input gave.

    Attributes:
        name: the input's.
        arrays: by layer, (frames, width), or (width,) if pooled; float32.
        times: by layer, float64, (frames, 3): start, center and end in seconds; none if pooled.
        edges: by layer that can have edge frames, how many of the last frames are that; none if pooled.
    """

    name: str
    arrays: Mapping[str, NDArray[Any]]
    times: Mapping[str, NDArray[np.float64]]
    edges: Mapping[str, int] = field(default_factory=dict)

    def keyed(self, *, part: bool) -> Iterator[tuple[str, NDArray[Any]]]:
        """All arrays under the names that formats with named arrays give them."""
        before = f"{self.name}/" if part else ""
        for layer, values in self.arrays.items():
            yield f"{before}{layer}", values
            if layer in self.times:
                yield f"{before}{layer}_times", self.times[layer]
            if layer in self.edges:
                yield f"{before}{layer}_edge_frames", np.array(self.edges[layer])


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        suffix: comes after the whole name of an input.
        write: (file, inputs, contents, part): a file of one input, or a part of a corpus.
        merge: (file, parts, contents): one file for the corpus; None if the format holds one input.
        package: that has to be installed, and the extra that brings it.
        extra: see above.
        one_layer: a file holds one layer; several make a file each.
        times_apart: a file holds one array; the frames' times make another.
        key: what becomes of a name in such a file.
    """

    suffix: str
    write: Callable[[Path, Sequence[Features], Contents, bool], None]
    merge: Callable[[Path, Sequence[Path], Contents], None] | None = None
    package: str = ""
    extra: str = ""
    one_layer: bool = False
    times_apart: bool = False
    key: Callable[[str], str] = str

    def missing(self) -> str:
        """What has to be installed before this format can be written; nothing if all is there."""
        try:
            if self.package:
                importlib.import_module(self.package)
        except ImportError:
            return f"{self.package} is not installed: pip install 'soundnet-port[{self.extra}]'"
        return ""

    def suffixes(self, contents: Contents) -> list[str]:
        """What comes after an input's name, for each of its files."""
        if not self.one_layer:
            return [self.suffix]
        stems = [f".{layer}" for layer in contents.widths] if len(contents.widths) > 1 else [""]
        kinds = ["", ".times"] if self.times_apart and contents.timed else [""]
        return [f"{stem}{kind}{self.suffix}" for stem in stems for kind in kinds]

    def split(self, features: Features) -> list[Features]:
        """The contents of each of an input's files, in the order of `suffixes`."""
        if not self.one_layer:
            return [features]
        files: list[Features] = []
        for layer, values in features.arrays.items():
            times = {layer: features.times[layer]} if layer in features.times else {}
            edges = {layer: features.edges[layer]} if layer in features.edges else {}
            files.append(Features(features.name, {layer: values}, times, edges))
            if self.times_apart and times:
                files.append(Features(features.name, times, {}))
        return files


def _write_npy(path: Path, inputs: Sequence[Features], contents: Contents, part: bool) -> None:
    (features,) = inputs
    (values,) = features.arrays.values()
    with open(path, "wb") as file:
        np.save(file, values, allow_pickle=False)


def _write_npz(path: Path, inputs: Sequence[Features], contents: Contents, part: bool) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        if not part:
            _add(archive, METADATA_KEY, np.array(contents.described()))
        for features in inputs:
            for key, values in features.keyed(part=part):
                _add(archive, key, values)


def _merge_npz(path: Path, parts: Sequence[Path], contents: Contents) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        _add(archive, METADATA_KEY, np.array(contents.described()))
        for part in parts:
            with zipfile.ZipFile(part) as source:
                for member in source.infolist():
                    large = member.file_size >= zipfile.ZIP64_LIMIT
                    with (
                        source.open(member) as values,
                        archive.open(zipfile.ZipInfo(member.filename), "w", force_zip64=large) as made,
                    ):
                        shutil.copyfileobj(values, made, 1 << 20)


def _add(archive: zipfile.ZipFile, key: str, values: NDArray[Any]) -> None:
    """As numpy.savez, whose files are of no date."""
    with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=values.nbytes >= 1 << 30) as file:
        np.lib.format.write_array(file, values, allow_pickle=False)


def _write_csv(path: Path, inputs: Sequence[Features], contents: Contents, part: bool) -> None:
    (layer,) = inputs[0].arrays if inputs else contents.widths
    width = contents.widths[layer]
    if contents.pool == "mean+std":
        units = [f"{kind}{i}" for kind in ("mean", "std") for i in range(width // 2)]
    else:
        units = [f"unit{i}" for i in range(width)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        times = ["start", "center", "end"] if contents.timed else []
        edged = contents.all_frames and layer in contents.edge_layers
        rows.writerow([*(["file"] if part else []), *times, *(["edge"] if edged else []), *units])
        for features in inputs:
            name = [features.name] if part else []
            values = features.arrays[layer]
            if contents.timed:
                ordinary = len(values) - features.edges.get(layer, 0)
                for frame, (seconds, row) in enumerate(
                    zip(features.times[layer].tolist(), values.tolist(), strict=True)
                ):
                    edge = [int(frame >= ordinary)] if edged else []
                    rows.writerow([*name, *seconds, *edge, *row])
            else:
                rows.writerow([*name, *values.tolist()])


def _merge_csv(path: Path, parts: Sequence[Path], contents: Contents) -> None:
    with open(path, "wb") as made:
        for number, part in enumerate(parts):
            with open(part, "rb") as source:
                header = source.readline()
                if number == 0:
                    made.write(header)
                shutil.copyfileobj(source, made, 1 << 20)


def _write_h5(path: Path, inputs: Sequence[Features], contents: Contents, part: bool) -> None:
    attributes = {} if part else {METADATA_KEY: contents.described()}
    arrays = [pair for features in inputs for pair in features.keyed(part=part)]
    save_h5(path, arrays, attributes)


def _merge_h5(path: Path, parts: Sequence[Path], contents: Contents) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        made: Any = file
        made.attrs[METADATA_KEY] = contents.described()
        for part in parts:
            with h5py.File(part) as source:

                def copied(name: str, found: Any) -> None:
                    if isinstance(found, h5py.Dataset):
                        made.create_dataset(name, data=found[()])

                source.visititems(copied)


def _write_torch7(path: Path, inputs: Sequence[Features], contents: Contents, part: bool) -> None:
    """As extract_feat.lua: one dataset, (channels, frames), squeezed."""
    (features,) = inputs
    ((layer, values),) = features.arrays.items()
    number = contents.metadata["modules"][layer]
    save_h5(path, [(f"layer{number}", np.ascontiguousarray(values.T.squeeze()))], {})


def _write_mat(path: Path, inputs: Sequence[Features], contents: Contents, part: bool) -> None:
    with open(path, "wb+") as file:
        if not part:
            _save_mat(file, METADATA_KEY, contents.described())
        for features in inputs:
            for key, values in features.keyed(part=part):
                _save_mat(file, key, values)
        _date_mat(file)


def _merge_mat(path: Path, parts: Sequence[Path], contents: Contents) -> None:
    """Variables lie one after the other behind a header of 128 bytes."""
    with open(path, "wb+") as made:
        _save_mat(made, METADATA_KEY, contents.described())
        for part in parts:
            with open(part, "rb") as source:
                source.seek(128)
                shutil.copyfileobj(source, made, 1 << 20)
        _date_mat(made)


def _save_mat(file: IO[bytes], key: str, values: object) -> None:
    from scipy.io import savemat

    savemat(file, {_mat_key(key): values}, appendmat=False, oned_as="row")


def _mat_key(key: str) -> str:
    name = key.encode("ascii", "backslashreplace").decode()
    return f"x{name}" if name.startswith("_") else name  # MATLAB hides it otherwise


def _date_mat(file: IO[bytes]) -> None:
    """Writes over the header's text, which has the time of day in it."""
    if file.tell() < 128:  # a part without any variable
        file.write(bytes(128 - file.tell()))
    file.seek(0)
    file.write(_MAT_HEADER)


def _write_parquet(path: Path, inputs: Sequence[Features], contents: Contents, part: bool) -> None:
    from pyarrow import parquet

    schema = _schema(contents)
    with parquet.ParquetWriter(path, schema) as writer:
        for features in inputs:
            for table in _tables(features, contents, schema):
                writer.write_table(table)


def _merge_parquet(path: Path, parts: Sequence[Path], contents: Contents) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = _schema(contents)
    with parquet.ParquetWriter(path, schema) as writer:
        held: list[Any] = []

        def flush() -> None:
            if held:
                writer.write_table(pyarrow.concat_tables(held).combine_chunks())
                held.clear()

        for part in parts:
            with parquet.ParquetFile(part) as source:
                for number in range(source.num_row_groups):
                    held.append(source.read_row_group(number).replace_schema_metadata(schema.metadata))
                    if sum(table.nbytes for table in held) >= _ROW_GROUP:
                        flush()
        flush()


def _schema(contents: Contents) -> Any:
    import pyarrow

    numbers = pyarrow.list_(pyarrow.float32())
    fields = [("path", pyarrow.string())]
    if contents.timed:
        if len(contents.widths) > 1:
            fields.append(("layer", pyarrow.string()))
        fields.append(("frame", pyarrow.int64()))
        fields += [(name, pyarrow.float64()) for name in ("start", "center", "end")]
        if contents.all_frames and contents.edge_layers:
            fields.append(("edge", pyarrow.bool_()))
    fields += [(layer, numbers) for layer in contents.widths]
    return pyarrow.schema(fields, metadata={METADATA_KEY: contents.described()})


def _tables(features: Features, contents: Contents, schema: Any) -> Iterator[Any]:
    """A row for the input, or for each frame: of one layer after the other, nulls in the other's column."""
    import pyarrow

    if not contents.timed:
        vectors = {layer: _lists(values[None]) for layer, values in features.arrays.items()}
        yield pyarrow.table({"path": [features.name], **vectors}, schema=schema)
        return
    for layer, values in features.arrays.items():
        rows = max(1, _ROW_GROUP // (values.itemsize * values.shape[1]))
        for first in range(0, len(values), rows):
            block, times = values[first : first + rows], features.times[layer][first : first + rows]
            frames = len(block)
            columns = {
                "path": [features.name] * frames,
                "layer": [layer] * frames,
                "frame": np.arange(first, first + frames),
                **dict(zip(("start", "center", "end"), times.T, strict=True)),
                "edge": np.arange(first, first + frames) >= len(values) - features.edges.get(layer, 0),
                **{other: pyarrow.nulls(frames, schema.field(other).type) for other in contents.widths},
                layer: _lists(block),
            }
            yield pyarrow.table({name: columns[name] for name in schema.names}, schema=schema)


def _lists(values: NDArray[np.float32]) -> Any:
    import pyarrow

    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values.ravel()))


# ---- each unit's largest values (for units.py)

MOST = 32  # sounds that are kept for each unit


def _write_peaks(path: Path, inputs: Sequence[Features], contents: Contents, part: bool) -> None:
    count = len(inputs)
    names = [features.name for features in inputs]
    made: dict[str, NDArray[Any]] = {
        "names": _as_bytes(names),
        "samples": np.array([features.arrays["samples"] for features in inputs], np.int64),
        "count": np.array(count),
    }
    for layer, width in contents.widths.items():
        values = np.array([features.arrays[layer] for features in inputs], np.float32).reshape(count, width)
        frames = np.array([features.arrays[f"{layer}_frames"] for features in inputs], np.int64)
        positive = np.maximum(values, 0, dtype=np.float64)
        made |= {
            layer: values,
            f"{layer}_frames": frames.reshape(count, width),
            f"{layer}_sounds": np.tile(np.arange(count)[:, None], width),
            f"{layer}_sums": np.array([positive.sum(0), np.square(positive).sum(0)]),
        }
    _save_peaks(path, _largest(made, contents))


def _merge_peaks(path: Path, parts: Sequence[Path], contents: Contents) -> None:
    """A part after the other, so that memory depends on the units and not on the corpus."""
    made = read_peaks(parts[0])
    for part in parts[1:]:
        more = read_peaks(part)
        before = len(made["samples"])
        made["names"] = _as_bytes([*names_of(made), *names_of(more)])
        made["samples"] = np.concatenate([made["samples"], more["samples"]])
        made["count"] = made["count"] + more["count"]
        for layer in contents.widths:
            more[f"{layer}_sounds"] += before
            for key in (layer, f"{layer}_frames", f"{layer}_sounds"):
                made[key] = np.concatenate([made[key], more[key]])
            made[f"{layer}_sums"] = made[f"{layer}_sums"] + more[f"{layer}_sums"]
        made = _largest(made, contents)
    _save_peaks(path, made)


def _largest(made: dict[str, NDArray[Any]], contents: Contents) -> dict[str, NDArray[Any]]:
    """The largest values of each unit, the first sound's where there are equal ones; and their sounds."""
    for layer in contents.widths:
        order = np.argsort(-made[layer], axis=0, kind="stable")[:MOST]
        for key in (layer, f"{layer}_frames", f"{layer}_sounds"):
            made[key] = np.take_along_axis(made[key], order, 0)
    kept = np.unique(np.concatenate([made[f"{layer}_sounds"].ravel() for layer in contents.widths]))
    names = names_of(made)
    made["names"], made["samples"] = _as_bytes([names[i] for i in kept]), made["samples"][kept]
    for layer in contents.widths:
        made[f"{layer}_sounds"] = np.searchsorted(kept, made[f"{layer}_sounds"])
    return made


def _save_peaks(path: Path, made: Mapping[str, NDArray[Any]]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for key, values in made.items():
            _add(archive, key, values)


def read_peaks(path: Path) -> dict[str, NDArray[Any]]:
    """What a pass over sounds has found.

    count: sounds that were heard; names and samples: of those that are among any unit's largest.
    For each layer, (sounds kept, channels): the values, the largest first, `_frames`, and `_sounds`
    by their place among the names; `_sums` (2, channels) of all sounds' values above 0 and of their squares.
    """
    with np.load(path) as data:
        return dict(data)


def names_of(peaks: Mapping[str, NDArray[Any]]) -> list[str]:
    names: list[str] = json.loads(peaks["names"].tobytes())
    return names


def _as_bytes(names: Sequence[str]) -> NDArray[np.uint8]:
    """Names take as much as they need; an array of texts takes the longest one's for each."""
    return np.frombuffer(json.dumps(names).encode(), np.uint8)


PEAKS = Format(".npz", _write_peaks, _merge_peaks)  # no format for users

FORMATS = {
    "npz": Format(".npz", _write_npz, _merge_npz),
    "npy": Format(".npy", _write_npy, one_layer=True, times_apart=True),
    "h5": Format(".h5", _write_h5, _merge_h5, package="h5py", extra="hdf5"),
    "csv": Format(".csv", _write_csv, _merge_csv, one_layer=True),
    "mat": Format(".mat", _write_mat, _merge_mat, package="scipy.io", extra="mat", key=_mat_key),
    "parquet": Format(".parquet", _write_parquet, _merge_parquet, package="pyarrow.parquet", extra="parquet"),
    "torch7": Format(".soundnet.h5", _write_torch7, package="h5py", extra="hdf5", one_layer=True),
}


def format_of(name: str) -> str | None:
    """The format that a file's name tells, or None."""
    if name.endswith(".hdf5"):
        return "h5"
    return next((form for form in FORMATS if name.endswith(FORMATS[form].suffix)), None)


def write_failures(path: Path, failures: Sequence[Failure]) -> None:
    path.write_bytes(failures_as_bytes(failures))


def failures_as_bytes(failures: Sequence[Failure]) -> bytes:
    lines = []
    for failure in failures:
        name = failure.path.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")
        lines.append(os.fsencode(f"{name}\t{' '.join(failure.reason.split())}\n"))
    return b"".join(lines)


def read_failures(path: Path) -> list[Failure]:
    try:
        return failures_from_bytes(path.read_bytes())
    except FileNotFoundError:
        return []


def failures_from_bytes(content: bytes) -> list[Failure]:
    failures = []
    for line in content.split(b"\n"):
        name, tab, reason = os.fsdecode(line).partition("\t")
        if tab:
            name = name.replace("\\\\", "\0").replace("\\t", "\t").replace("\\n", "\n").replace("\0", "\\")
            failures.append(Failure(name, reason))
    return failures
