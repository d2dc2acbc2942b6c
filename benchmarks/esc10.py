r"""Both networks on ESC-10 from scratch, every fold held out in turn; a table, and a picture of the curves.

    python benchmarks/esc10.py ESC-10 RUNS [WORKERS]

The same as

    soundnet-port finetune ESC-10 --scratch soundnet8 --edge-frames --test all --workers 2 -o RUNS/soundnet8
    soundnet-port finetune ESC-10 --scratch soundnet5 --edge-frames --epochs 90 --seconds 2.5 --test all \
        --workers 2 -o RUNS/soundnet5

Folds that are done are not repeated. The figures are from before edge frames could be left out.
"""

import csv
import sys
from pathlib import Path
from statistics import mean, pstdev

from matplotlib.figure import Figure

from soundnet_port.learning.finetuning import LOG, FinetuneConfig, cross_validate
from soundnet_port.network.architecture import ARCHITECTURES

SETTINGS = {  # so that five folds take about 45 minutes on two cores
    "soundnet8": {"tuning": FinetuneConfig(edge_frames=True)},
    "soundnet5": {"tuning": FinetuneConfig(epochs=90, seconds=2.5, edge_frames=True)},
}
PAPER = {"soundnet8": 0.755, "soundnet5": 0.823}  # from scratch, the paper's table 3


def main(esc10: str, runs: str, workers: str = "2") -> None:
    """Trains what is not there yet, prints the table, draws RUNS/esc10.png."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, len(SETTINGS), sharex="col", sharey="row", squeeze=False)
    for column, (name, settings) in enumerate(SETTINGS.items()):
        made = cross_validate(
            esc10,
            Path(runs) / name,
            workers=int(workers),
            start=ARCHITECTURES[name],
            **settings,
        )
        accuracies = [each.accuracy for each in made]
        folds = "  ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        minutes = sum(each.seconds for each in made) / 60
        print(
            f"{name}  {folds}  mean {mean(accuracies):.2%}, std {pstdev(accuracies):.1%}; "
            f"the paper {PAPER[name]:.1%}; {minutes:.0f} minutes over all processes"
        )
        for each in made:
            rows = list(csv.DictReader((each.folder / LOG).read_text("utf-8").splitlines()))
            losses = [float(row["loss"]) for row in rows]
            axes[0, column].plot(range(1, len(rows) + 1), losses, label=f"fold {each.fold}", linewidth=1)
            found = [
                (epoch, 100 * float(row["test accuracy"]))
                for epoch, row in enumerate(rows, 1)
                if row["test accuracy"]
            ]
            axes[1, column].plot(*zip(*found, strict=True), marker=".", linewidth=1)
        axes[1, column].axhline(100 * PAPER[name], color="black", linestyle=":", linewidth=1)
        axes[1, column].annotate("the paper", (1, 100 * PAPER[name]), va="bottom")
        axes[0, column].set_title(f"{name}: {mean(accuracies):.1%}")
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].set_ylabel("training loss (of mixed sounds)")
    axes[1, 0].set_ylabel("accuracy on the fold held out, %")
    axes[0, 0].legend()
    figure.savefig(Path(runs) / "esc10.png", dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])
