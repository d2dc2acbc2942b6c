r"""Train both networks on ESC-10 from scratch, holding out each fold in turn; print a table, plot curves.

    python benchmarks/esc10.py ESC-10 RUNS [WORKERS]

The same as

    soundnet-port finetune ESC-10 --scratch soundnet8 --edge-frames --test all --workers 2 -o RUNS/soundnet8
    soundnet-port finetune ESC-10 --scratch soundnet5 --edge-frames --epochs 90 --seconds 2.5 --test all \
        --workers 2 -o RUNS/soundnet5

Folds that are done are not repeated. Edge frames are included, as in the published figures.
"""

import csv
import sys
from pathlib import Path
from statistics import mean, pstdev

from matplotlib.figure import Figure

from soundnet_port.learning.finetune_run import FinetuneConfig
from soundnet_port.learning.finetuning import cross_validate
from soundnet_port.learning.run_files import LOG
from soundnet_port.network.architecture import ARCHITECTURES

CONFIGS = {  # five folds take about 45 minutes on two cores
    "soundnet8": FinetuneConfig(edge_frames=True),
    "soundnet5": FinetuneConfig(epochs=90, seconds=2.5, edge_frames=True),
}
PAPER = {"soundnet8": 0.755, "soundnet5": 0.823}  # from scratch, the paper's table 3


def main(esc10: str, runs: str, workers: str = "2") -> None:
    """Train the missing folds, print the table, plot RUNS/esc10.png."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, len(CONFIGS), sharex="col", sharey="row", squeeze=False)
    for column, (name, config) in enumerate(CONFIGS.items()):
        results = cross_validate(
            esc10,
            Path(runs) / name,
            workers=int(workers),
            weights=ARCHITECTURES[name],
            config=config,
            device="cpu",
        )
        accuracies = [result.accuracy for result in results]
        folds = "  ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        minutes = sum(result.seconds for result in results) / 60
        print(
            f"{name}  {folds}  mean {mean(accuracies):.2%}, std {pstdev(accuracies):.1%}; "
            f"the paper {PAPER[name]:.1%}; {minutes:.0f} minutes over all processes"
        )
        for result in results:
            rows = list(csv.DictReader((result.folder / LOG).read_text("utf-8").splitlines()))
            losses = [float(row["loss"]) for row in rows]
            axes[0, column].plot(range(1, len(rows) + 1), losses, label=f"fold {result.fold}", linewidth=1)
            points = [
                (epoch, 100 * float(row["test accuracy"]))
                for epoch, row in enumerate(rows, 1)
                if row["test accuracy"]
            ]
            axes[1, column].plot(*zip(*points, strict=True), marker=".", linewidth=1)
        axes[1, column].axhline(100 * PAPER[name], color="black", linestyle=":", linewidth=1)
        axes[1, column].annotate("the paper", (1, 100 * PAPER[name]), va="bottom")
        axes[0, column].set_title(f"{name}: {mean(accuracies):.1%}")
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].set_ylabel("training loss (of mixed sounds)")
    axes[1, 0].set_ylabel("accuracy on the held-out fold, %")
    axes[0, 0].legend()
    figure.savefig(Path(runs) / "esc10.png", dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
