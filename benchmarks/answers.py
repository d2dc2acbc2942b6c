"""What the released network answers on ESC-10, with edge frames and without, and at lower levels.

    python benchmarks/answers.py ESC10 [-w soundnet8] [--show]

Prints for `predict` as the original does it (edge frames, clips repeated to 10 s) and by default: how often
each head's first answer is one of the nonsense answers of edge frames, how many different first answers there
are, and how well a logistic regression on the clips' log-probabilities tells the classes apart (five folds).
Then, for gains from 1 to 0.001, how often the first answers stay, how far the probabilities move, and the
same classifier, trained at gain 1. --show lists the answers of five clips of each class.
"""

import argparse
from collections import Counter

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import soundnet_port as sp

NONSENSE = {"Norfolk terrier", "pole", "parking garage, outdoor"}
GAINS = (1, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
HEADS = ("objects", "scenes")


def log_probabilities(prediction):
    values = [prediction.object_probabilities.mean(1), prediction.scene_probabilities.mean(1)]
    return torch.cat(values).clamp(min=1e-12).log().numpy()


def accuracies(train, test, labels, folds):
    """Of each fold, learned from `train`'s other folds and tested on `test`'s."""
    result = []
    for fold in sorted(set(folds)):
        held_out = folds == fold
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
        classifier.fit(train[~held_out], labels[~held_out])
        result.append(classifier.score(test[held_out], labels[held_out]))
    return result


def percent(values):
    return f"{100 * np.mean(values):.2f} % ({', '.join(f'{100 * value:.2f}' for value in values)})"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("esc10")
    parser.add_argument("-w", "--weights", default="soundnet8")
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    model = sp.load_pretrained(options.weights)
    sounds = sp.read_labeled(options.esc10).sounds
    labels = np.array([sound.label for sound in sounds])
    folds = np.array([sound.fold for sound in sounds])
    waves = [sp.load_audio(sound.path) for sound in sounds]
    default = []
    for edge_frames in (True, False):
        predictions = [sp.predict(model, wave, edge_frames=edge_frames) for wave in waves]
        print(f"\n{'as the original (edge frames)' if edge_frames else 'default (no edge frames)'}")
        for head in HEADS:
            first = Counter(getattr(prediction, head)[0].label for prediction in predictions)
            nonsense = sum(count for label, count in first.items() if label in NONSENSE)
            print(f"  {head}: {len(first)} different first answers; nonsense {nonsense} of {len(sounds)};")
            print(
                f"    most frequent: {', '.join(f'{label} {count}' for label, count in first.most_common(6))}"
            )
        features = np.stack([log_probabilities(prediction) for prediction in predictions])
        print(f"  logistic regression: {percent(accuracies(features, features, labels, folds))}")
        default = predictions
    if options.show:
        for label in sorted(set(labels)):
            print(f"\n{label}")
            for number in np.flatnonzero(labels == label)[:40:8]:
                prediction = default[number]
                answers = [
                    ", ".join(c.label.split(",")[0] for c in getattr(prediction, h)[:3]) for h in HEADS
                ]
                print(f"  {sounds[number].path.name}: {' | '.join(answers)}")
    at_one = np.stack([log_probabilities(prediction) for prediction in default])
    levels = np.array([prediction.level for prediction in default])
    run_in_workers = np.percentile(levels, [0, 1, 5, 25, 50, 75, 100]).round(1)
    print(
        f"\nlevels (loudest second; percentiles 0, 1, 5, 25, 50, 75, 100): {run_in_workers} dB of full scale"
    )
    rows = []
    for normalize in (False, True):
        print(
            f"\n{'normalized first' if normalize else 'as they are'}; the classifier has learned from gain 1"
        )
        print(f"{'gain':>6}{'dB':>6}{'objects stay':>14}{'scenes stay':>13}{'moved':>8}  classifier")
        learned = None
        for gain in GAINS:
            predictions = [sp.predict(model, wave * gain, normalize=normalize) for wave in waves]
            features = np.stack([log_probabilities(prediction) for prediction in predictions])
            learned = features if learned is None else learned
            stays = np.array(
                [
                    [getattr(p, head)[0].index == getattr(q, head)[0].index for head in HEADS]
                    for p, q in zip(predictions, default, strict=True)
                ]
            )
            # total variation, the mean of both heads
            moved = np.abs(np.exp(features) - np.exp(at_one)).sum(1) / 4
            objects, scenes = 100 * stays.mean(0)
            print(
                f"{gain:>6g}{20 * np.log10(gain):>6.0f}{objects:>12.1f} %{scenes:>11.1f} %"
                f"{100 * moved.mean():>6.1f} %  {percent(accuracies(learned, features, labels, folds))}",
                flush=True,
            )
            if not normalize:
                rows += zip(levels + 20 * np.log10(gain), stays.mean(1), moved, strict=True)
    print("\nas they are, by the level after the gain:")
    after, kept, distances = np.array(rows).T
    for low in range(-110, 0, 10):
        inside = (after >= low) & (after < low + 10)
        if inside.any():
            print(
                f"  {low:>5} to {low + 10:>4} dB: {inside.sum():>4} clips, first answers stay "
                f"{100 * kept[inside].mean():5.1f} %, probability moved "
                f"{100 * distances[inside].mean():5.1f} %"
            )


if __name__ == "__main__":
    main()
