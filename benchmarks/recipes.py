"""Which layers, poolings, speeds and levels classify best: python benchmarks/recipes.py ESC-10 [WEIGHTS].

Prints the accuracy of recipes for the protocol "modern" of `evaluate`, each with its penalty chosen inside
the training folds; and the nested figure: in each fold the recipe, too, is the one that does best when the
training folds are left out in turn. Only that one is unbiased for the data set that recipes are compared on.
"few": accuracies with the roles of training and test folds exchanged.
"""

import sys
from itertools import product

import numpy as np
import torch

import soundnet_port as sp
from soundnet_port.learning.classifiers import fit_pooled_classifier
from soundnet_port.learning.feature_cache import open_cache
from soundnet_port.learning.protocol_features import ModernFeatures

LAYERS = ("conv3", "conv4", "conv5", "pool5", "conv6", "conv7")
SETS = [(layer,) for layer in LAYERS] + [
    ("pool5", "conv6"),
    ("conv4", "pool5", "conv6"),
    ("conv4", "conv5", "pool5", "conv6"),
    ("conv4", "pool5", "conv6", "conv7"),
    LAYERS,
]
POOLS = ("mean", "mean+std", "mean+max+std")
SPEEDS = ((0,), (0, 1))
LEVELS = ((0,), (0, 1, 2))
STATISTICS = ("mean", "max", "std")


def main():
    data = sp.read_labeled(sys.argv[1])
    model = sp.load_pretrained(*sys.argv[2:3])
    torch.set_num_threads(1)
    extractor = ModernFeatures(model, LAYERS, "mean+max+std", cache=open_cache(True, model))
    rows = np.stack([extractor.extract(sound.path)[0] for sound in data.sounds])
    channels = [layer.channels for layer in extractor.layers]
    edges = np.cumsum([0] + [count for _ in range(2) for size in channels for count in [size] * 3])
    blocks = {
        key: rows[:, :, edges[n] : edges[n + 1]]
        for n, key in enumerate(product(range(2), LAYERS, STATISTICS))  # in the order of ModernFeatures
    }
    targets, folds = np.array(data.targets), np.array([sound.fold for sound in data.sounds])

    def features(recipe):
        layers, pool, speeds, levels = recipe
        parts = [
            [blocks[speed, layer, name] for name in pool.split("+")] for speed in speeds for layer in layers
        ]
        joined = np.concatenate([block for part in parts for block in part], 2)[:, list(levels)]
        return joined, [sum(block.shape[2] for block in part) for part in parts]

    def accuracy(recipe, train, test):
        values, sizes = features(recipe)
        classifier = fit_pooled_classifier(values[train], sizes, targets[train], list(folds[train]), "")
        return float((classifier.decide(values[test]).argmax(1) == targets[test]).mean())

    def mean_accuracy(recipe, splits):
        return float(np.mean([accuracy(recipe, train, test) for train, test in splits]))

    names = sorted(set(folds))
    outer = [(np.flatnonzero(folds != name), np.flatnonzero(folds == name)) for name in names]
    recipes = [
        *((layers, pool, (0, 1), (0, 1, 2)) for layers, pool in product(SETS, POOLS)),
        *((("conv4", "pool5", "conv6"), "mean+max+std", *views) for views in product(SPEEDS, LEVELS)),
    ]
    recipes = list(dict.fromkeys(recipes))
    print(f"{'layers':<32}{'pooling':<14}{'speeds':>7}{'levels':>7}{'accuracy':>10}{'few':>8}")
    for recipe in recipes:
        layers, pool, speeds, levels = recipe
        figures = mean_accuracy(recipe, outer), mean_accuracy(recipe, [split[::-1] for split in outer])
        row = f"{' '.join(layers):<32}{pool:<14}{len(speeds):>7}{len(levels):>7}"
        print(row + f"{figures[0]:>10.1%}{figures[1]:>8.1%}", flush=True)
    nested = []
    for name, (train, test) in zip(names, outer, strict=True):
        inner = [
            (train[folds[train] != other], train[folds[train] == other]) for other in names if other != name
        ]
        best = max(recipes, key=lambda recipe: mean_accuracy(recipe, inner))
        nested.append(accuracy(best, train, test))
        print(f"without fold {name}: {best}, {nested[-1]:.1%}", flush=True)
    print(f"nested: {np.mean(nested):.2%}, std over folds {np.std(nested):.1%}")


if __name__ == "__main__":
    main()
