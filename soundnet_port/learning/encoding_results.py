"""The results of encoding models, as text, arrays, JSON and a figure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soundnet_port.corpus.features import result_key
from soundnet_port.errors import require
from soundnet_port.files import atomic_write
from soundnet_port.version import __version__

Values = NDArray[np.float32]
ENCODING = "encoding.json"
_FEW_OUTPUTS = 50  # up to here the figure has a dot for each


@dataclass(frozen=True)
class EncodingResult:
    """Figures of held-out runs; outputs that could not be used are NaN.

    Attributes:
        layers: in the order of the arrays.
        channels: of each layer.
        folds: names of the held-out sets, from their runs.
        volumes: number of rows of targets that were used.
        fold_correlation: (layers, folds, outputs).
        fold_r2: (layers, folds, outputs).
        alpha: (layers, folds, outputs), the penalty that was chosen without the fold.
        noise_ceiling: (outputs,), the largest correlation that a model of the stimulus can reach; NaN
            without repeats.
        predictions: of each layer, (all rows of targets in the order of the recordings, outputs), in units of
            z-scored targets, by models without the row's fold, NaN where a row was left out; None if not
            requested.
        settings: of the fit.
        notes: caveats, and how many volumes were left out.
        seconds: time that was taken, by part.
    """

    layers: tuple[str | int, ...]
    channels: tuple[int, ...]
    folds: tuple[str, ...]
    volumes: int
    fold_correlation: Values
    fold_r2: Values
    alpha: Values
    noise_ceiling: Values
    predictions: tuple[Values, ...] | None
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def empty(
        cls,
        layers: tuple[str | int, ...],
        channels: tuple[int, ...],
        folds: tuple[str, ...],
        outputs: int,
        volumes: int,
        predicted_volumes: int | None,
        settings: dict[str, Any],
    ) -> EncodingResult:
        """Return a result that is NaN everywhere; with predictions unless `predicted_volumes` is None."""

        def unknown(*shape: int) -> Values:
            return np.full(shape, np.nan, np.float32)

        shape = (len(layers), len(folds), outputs)
        predictions = None
        if predicted_volumes is not None:
            predictions = tuple(unknown(predicted_volumes, outputs) for _ in layers)
        arrays = unknown(*shape), unknown(*shape), unknown(*shape), unknown(outputs)
        return cls(layers, channels, folds, volumes, *arrays, predictions, settings)

    @property
    def correlation(self) -> Values:
        """Mean over folds of prediction and target's correlation, (layers, outputs)."""
        return np.asarray(self.fold_correlation.mean(1))

    @property
    def r2(self) -> Values:
        """Mean over folds of the share of variance explained, (layers, outputs)."""
        return np.asarray(self.fold_r2.mean(1))

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Which outputs could be fitted, (outputs,)."""
        return np.asarray(np.isfinite(self.correlation).all(0), bool)

    @property
    def best_layer(self) -> NDArray[np.int64]:
        """The index in `layers` of each output's highest correlation, (outputs,); -1 where there is none."""
        best = np.where(self.usable, np.nan_to_num(self.correlation, nan=-np.inf).argmax(0), -1)
        return np.asarray(best, np.int64)

    @property
    def has_ceiling(self) -> bool:
        """Whether there were repeats."""
        return bool(np.isfinite(self.noise_ceiling).any())

    def summarize(self) -> list[dict[str, Any]]:
        """Return a dictionary per layer: medians over outputs, and for how many it is the best layer."""
        correlation, r2 = self.correlation[:, self.usable], self.r2[:, self.usable]
        return [
            {
                "layer": layer,
                "channels": self.channels[number],
                "median_correlation": float(np.median(correlation[number])),
                "p90_correlation": float(np.quantile(correlation[number], 0.9)),
                "median_r2": float(np.median(r2[number])),
                "best_for": int((self.best_layer == number).sum()),
            }
            for number, layer in enumerate(self.layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return settings, summaries and notes, ready for JSON."""
        ceiling = self.noise_ceiling[np.isfinite(self.noise_ceiling)]
        return {
            "version": __version__,
            **self.settings,
            "folds": list(self.folds),
            "volumes": self.volumes,
            "outputs": len(self.usable),
            "usable_outputs": int(self.usable.sum()),
            "layers": self.summarize(),
            "median_noise_ceiling": float(np.median(ceiling)) if len(ceiling) else None,
            "notes": self.notes,
            "seconds": {name: round(seconds, 1) for name, seconds in self.seconds.items()},
        }


def format_encoding(result: EncodingResult) -> str:
    """Format a table with a line per layer."""
    lines = [f"{'layer':10}{'channels':>9}{'median r':>10}{'90th pct.':>11}{'median R2':>11}{'best for':>10}"]
    lines += [
        f"{result_key(row['layer']):10}{row['channels']:>9,}{row['median_correlation']:>10.3f}"
        f"{row['p90_correlation']:>11.3f}{row['median_r2']:>11.3f}{row['best_for']:>10,}"
        for row in result.summarize()
    ]
    if result.has_ceiling:
        ceiling = result.noise_ceiling[result.usable]
        lines.append(f"{'ceiling':19}{np.median(ceiling):>10.3f}{np.quantile(ceiling, 0.9):>11.3f}")
    return "\n".join(lines)


def write_encoding(result: EncodingResult, folder: str | os.PathLike[str]) -> list[Path]:
    """Write encoding.json, arrays and encoding.png; predictions, if any, as predictions/LAYER.npy.

    Raises:
        MissingExtraError: the extra `[plot]` is not installed.
        OSError: they cannot be written.
    """
    folder = Path(folder)
    figure = draw_encoding(result)
    paths = []
    for name, values in _arrays(result):
        paths.append(folder / f"{name}.npy")
        with atomic_write(paths[-1]) as temporary, open(temporary, "wb") as file:
            np.save(file, values)
    paths.append(folder / "encoding.png")
    with atomic_write(paths[-1]) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    paths.append(folder / ENCODING)  # last: it marks complete results
    with atomic_write(paths[-1]) as temporary:
        temporary.write_text(json.dumps(result.to_dict(), indent=1) + "\n", "utf-8")
    return paths


def _arrays(result: EncodingResult) -> Iterator[tuple[str, NDArray[Any]]]:
    yield "correlation", result.correlation
    yield "r2", result.r2
    yield "best_layer", result.best_layer
    yield "fold_correlation", result.fold_correlation
    yield "fold_r2", result.fold_r2
    yield "alpha", result.alpha
    if result.has_ceiling:
        yield "noise_ceiling", result.noise_ceiling
    for layer, values in zip(result.layers, result.predictions or (), strict=False):
        yield f"predictions/{result_key(layer)}", values


def draw_encoding(result: EncodingResult) -> Any:
    """Draw each layer's correlations over outputs, and for what share of outputs it is the best.

    Raises:
        MissingExtraError: the extra `[plot]` is not installed.
    """
    figure = require("matplotlib.figure", "plot").Figure(
        figsize=(3 + 1.1 * len(result.layers), 4), layout="constrained"
    )
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    names = [result_key(layer) for layer in result.layers]
    values = result.correlation[:, result.usable]
    places = np.arange(len(names))
    left.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    if values.shape[1] > _FEW_OUTPUTS:
        left.boxplot(
            list(values),
            positions=places,
            widths=0.6,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": "#9ec5e8", "edgecolor": "#1f4e79"},
            medianprops={"color": "#1f4e79", "linewidth": 2},
            whiskerprops={"color": "#1f4e79"},
            capprops={"color": "#1f4e79"},
            manage_ticks=False,
        )
        title = "box: quartiles over outputs; whiskers: 5 and 95 %"
    else:
        spread = np.linspace(-0.2, 0.2, values.shape[1]) if values.shape[1] > 1 else np.zeros(1)
        for place, own in zip(places, values, strict=True):
            left.scatter(place + spread, own, s=14, color="#2f79b9", linewidths=0)
            left.hlines(np.median(own), place - 0.3, place + 0.3, color="#1f4e79", linewidth=2)
        title = "a dot per output; line: median"
    left.set_title(title, fontsize=9)
    if result.has_ceiling:
        low, median, high = np.quantile(result.noise_ceiling[result.usable], (0.25, 0.5, 0.75))
        left.axhspan(low, high, color="0.88", zorder=-1)
        left.axhline(median, color="0.35", linestyle="--", linewidth=1, zorder=0)
        left.annotate(
            "noise ceiling: median, quartiles",
            (1, high),
            (-3, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.35",
        )
    left.set_xlim(-0.6, len(names) - 0.4)
    left.set_xticks(places, names, rotation=45)
    left.set_ylabel("correlation in held-out runs")
    shares = np.array([(result.best_layer == number).sum() for number in places]) / result.usable.sum()
    right.bar(places, 100 * shares, color="#e0a458", edgecolor="#8a5a17")
    right.set_xticks(places, names, rotation=45)
    right.set_ylabel("outputs (%)")
    right.set_title("best layer", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    count, outputs = len(result.folds), int(result.usable.sum())
    figure.suptitle(
        f"{outputs:,} output{'s' * (outputs != 1)}, {result.volumes:,} volumes, {count} folds", fontsize=11
    )
    return figure
