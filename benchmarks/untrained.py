"""A network that has learnt nothing, as weights: what an evaluation of trained ones is to be compared with.

    python benchmarks/untrained.py ESC-10 untrained.safetensors

Parameters are PyTorch's random ones after torch.manual_seed(0), batch norm with weights 1 and biases 0. Only
batch norm's means and variances are estimated, from all of the data set's sounds and without their labels:
one pass in training mode, sound by sound, plain averages over sounds.
"""

import sys

import torch

import soundnet_port as sp
from soundnet_port.learning.datasets import read_labeled
from soundnet_port.network.weights import write_weights


def untrained(paths, architecture=sp.SOUNDNET8):
    """A network with random parameters that has heard these sounds."""
    torch.manual_seed(0)
    model = sp.SoundNet(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = None  # cumulative average
    with torch.no_grad():
        for path in paths:
            model.extract(sp.load_audio(path), [architecture.last_layer])
    return model.eval()


if __name__ == "__main__":
    source, destination = sys.argv[1:]
    model = untrained(sound.path for sound in read_labeled(source).sounds)
    state = {name: tensor for name, tensor in model.state_dict().items() if "batches" not in name}
    write_weights(destination, model.architecture, state, {"converter": sp.__version__})
