"""The baseline of several benchmarks: the trunk as most ports of the network write it."""

from torch import nn


def plain_port(model):
    """Return Conv2d, BatchNorm2d, ReLU and MaxPool2d, one after the other, with a SoundNet's weights."""
    modules, channels = [], 1
    for block in model.architecture.blocks:
        conv = nn.Conv2d(channels, block.channels, (block.kernel, 1), (block.stride, 1), (block.padding, 0))
        norm = nn.BatchNorm2d(block.channels)
        source = model.get_submodule(block.name)
        conv.weight.data, conv.bias.data = source.weight.data[..., None], source.bias.data
        norm.load_state_dict(model.get_submodule(block.norm).state_dict())
        modules += [conv, norm, nn.ReLU(inplace=True)]
        if block.pool:
            modules.append(nn.MaxPool2d((block.pool, 1)))
        channels = block.channels
    return nn.Sequential(*modules).eval()
