"""Tables with a row per sound or frame: CSV and Parquet.

Writers take (path, sounds, spec, part), mergers (path, parts, spec); see `formats.Format`.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.corpus.features import METADATA_KEY, Features, OutputSpec

TIME_COLUMNS = ("start", "center", "end")
_ROW_GROUP_BYTES = 1 << 25  # of numbers, in a row group of a merged Parquet file


# ---- CSV


def write_csv(path: Path, sounds: Sequence[Features], spec: OutputSpec, part: bool) -> None:
    (layer,) = sounds[0].arrays if sounds else spec.widths
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(_csv_header(layer, spec, part))
        for features in sounds:
            name = [features.name] if part else []
            values = features.arrays[layer]
            if not spec.timed:
                rows.writerow([*name, *values.tolist()])
                continue
            ordinary = len(values) - features.edge_frames.get(layer, 0)
            frames = zip(features.times[layer].tolist(), values.tolist(), strict=True)
            for frame, (seconds, row) in enumerate(frames):
                edge = [int(frame >= ordinary)] if _has_edge_column(layer, spec) else []
                rows.writerow([*name, *seconds, *edge, *row])


def merge_csv(path: Path, parts: Sequence[Path], spec: OutputSpec) -> None:
    (layer,) = spec.widths
    with open(path, "wb") as merged:
        # not a part's own header: earlier versions spelled "center" otherwise
        merged.write((",".join(_csv_header(layer, spec, part=True)) + "\n").encode())
        for part in parts:
            with open(part, "rb") as source:
                source.readline()
                shutil.copyfileobj(source, merged, 1 << 20)


def _csv_header(layer: str, spec: OutputSpec, part: bool) -> list[str]:
    width = spec.widths[layer]
    if "+" in spec.pool:
        kinds = spec.pool.split("+")
        units = [f"{kind}{unit}" for kind in kinds for unit in range(width // len(kinds))]
    else:
        units = [f"unit{unit}" for unit in range(width)]
    return [
        *(["file"] if part else []),
        *(TIME_COLUMNS if spec.timed else ()),
        *(["edge"] if _has_edge_column(layer, spec) else []),
        *units,
    ]


def _has_edge_column(layer: str, spec: OutputSpec) -> bool:
    return spec.all_frames and layer in spec.edge_layers


# ---- Parquet


def write_parquet(path: Path, sounds: Sequence[Features], spec: OutputSpec, part: bool) -> None:
    from pyarrow import parquet

    schema = _schema(spec)
    with parquet.ParquetWriter(path, schema) as writer:
        for features in sounds:
            for table in _tables(features, spec, schema):
                writer.write_table(table)


def merge_parquet(path: Path, parts: Sequence[Path], spec: OutputSpec) -> None:
    import pyarrow
    from pyarrow import parquet

    schema = _schema(spec)
    with parquet.ParquetWriter(path, schema) as writer:
        tables: list[Any] = []

        def flush() -> None:
            if tables:
                writer.write_table(pyarrow.concat_tables(tables).combine_chunks())
                tables.clear()

        for part in parts:
            with parquet.ParquetFile(part) as source:
                for group in range(source.num_row_groups):
                    # renamed, as earlier versions spelled "center" otherwise
                    table = source.read_row_group(group).rename_columns(schema.names)
                    tables.append(table.replace_schema_metadata(schema.metadata))
                    if sum(table.nbytes for table in tables) >= _ROW_GROUP_BYTES:
                        flush()
        flush()


def _schema(spec: OutputSpec) -> Any:
    import pyarrow

    fields = [("path", pyarrow.string())]
    if spec.timed:
        if len(spec.widths) > 1:
            fields.append(("layer", pyarrow.string()))
        fields.append(("frame", pyarrow.int64()))
        fields += [(name, pyarrow.float64()) for name in TIME_COLUMNS]
        if spec.all_frames and spec.edge_layers:
            fields.append(("edge", pyarrow.bool_()))
    fields += [(layer, pyarrow.list_(pyarrow.float32())) for layer in spec.widths]
    return pyarrow.schema(fields, metadata={METADATA_KEY: spec.metadata_json()})


def _tables(features: Features, spec: OutputSpec, schema: Any) -> Iterator[Any]:
    """Yield a row for the sound, or a row per frame, layer by layer; other layers' columns are null."""
    import pyarrow

    if not spec.timed:
        vectors = {layer: _list_array(values[None]) for layer, values in features.arrays.items()}
        yield pyarrow.table({"path": [features.name], **vectors}, schema=schema)
        return
    for layer, values in features.arrays.items():
        rows = max(1, _ROW_GROUP_BYTES // (values.itemsize * values.shape[1]))
        for first in range(0, len(values), rows):
            block, times = values[first : first + rows], features.times[layer][first : first + rows]
            frames = len(block)
            columns = {
                "path": [features.name] * frames,
                "layer": [layer] * frames,
                "frame": np.arange(first, first + frames),
                **dict(zip(TIME_COLUMNS, times.T, strict=True)),
                "edge": np.arange(first, first + frames) >= len(values) - features.edge_frames.get(layer, 0),
                **{other: pyarrow.nulls(frames, schema.field(other).type) for other in spec.widths},
                layer: _list_array(block),
            }
            yield pyarrow.table({name: columns[name] for name in schema.names}, schema=schema)


def _list_array(values: NDArray[np.float32]) -> Any:
    import pyarrow

    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pyarrow.ListArray.from_arrays(offsets, pyarrow.array(values.ravel()))
