"""File formats of results, by name.

Every format but npy and torch7 has two kinds of files: one per input, and one for a whole corpus. The
latter is merged from parts, files of the same format with some of the inputs each, one array at a time.
Equal features give equal bytes: no dates, everything in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from soundnet_port.corpus import array_formats, peaks, table_formats
from soundnet_port.corpus.features import Features, OutputSpec
from soundnet_port.errors import require


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        suffix: appended to the full name of an input.
        write: (path, sounds, spec, part): writes the file of one input, or a part of a corpus.
        merge: (path, parts, spec): writes one file for the corpus; None if the format holds one input.
        package: that the format needs.
        extra: that installs the package.
        one_layer: a file holds one layer; several layers get a file each.
        separate_times: a file holds one array; the frames' times get a file of their own.
        array_name: returns an array's name as the format spells it.
    """

    suffix: str
    write: Callable[[Path, Sequence[Features], OutputSpec, bool], None]
    merge: Callable[[Path, Sequence[Path], OutputSpec], None] | None = None
    package: str = ""
    extra: str = ""
    one_layer: bool = False
    separate_times: bool = False
    array_name: Callable[[str], str] = str

    def check_package(self) -> None:
        """Raise a MissingExtraError if the package that writes this format is not installed."""
        if self.package:
            require(self.package, self.extra)

    def suffixes(self, spec: OutputSpec) -> list[str]:
        """Return the suffixes of an input's files."""
        if not self.one_layer:
            return [self.suffix]
        layers = [f".{layer}" for layer in spec.widths] if len(spec.widths) > 1 else [""]
        kinds = ["", ".times"] if self.separate_times and spec.timed else [""]
        return [f"{layer}{kind}{self.suffix}" for layer in layers for kind in kinds]

    def split(self, features: Features) -> list[Features]:
        """Return what each of an input's files contains, in the order of `suffixes`."""
        if not self.one_layer:
            return [features]
        files: list[Features] = []
        for layer, values in features.arrays.items():
            times = {layer: features.times[layer]} if layer in features.times else {}
            edges = {layer: features.edge_frames[layer]} if layer in features.edge_frames else {}
            files.append(Features(features.name, {layer: values}, times, edges))
            if self.separate_times and times:
                files.append(Features(features.name, times, {}))
        return files


FORMATS = {
    "npz": Format(".npz", array_formats.write_npz, array_formats.merge_npz),
    "npy": Format(".npy", array_formats.write_npy, one_layer=True, separate_times=True),
    "h5": Format(".h5", array_formats.write_h5, array_formats.merge_h5, "h5py", "hdf5"),
    "csv": Format(".csv", table_formats.write_csv, table_formats.merge_csv, one_layer=True),
    "mat": Format(
        ".mat",
        array_formats.write_mat,
        array_formats.merge_mat,
        "scipy.io",
        "mat",
        array_name=array_formats.mat_name,
    ),
    "parquet": Format(
        ".parquet", table_formats.write_parquet, table_formats.merge_parquet, "pyarrow.parquet", "parquet"
    ),
    "torch7": Format(".soundnet.h5", array_formats.write_torch7, None, "h5py", "hdf5", one_layer=True),
}

PEAKS = Format(".npz", peaks.write_peaks, peaks.merge_peaks)  # internal, for the search of top sounds


def infer_format(filename: str) -> str | None:
    """Return the name of the format with a file's suffix, or None."""
    if filename.endswith(".hdf5"):
        return "h5"
    return next((name for name, form in FORMATS.items() if filename.endswith(form.suffix)), None)
