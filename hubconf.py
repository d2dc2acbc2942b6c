"""For torch.hub, from a clone: torch.hub.load("path/to/clone", "demo", source="local"). See docs/hubs.md."""

import soundnet_port as _soundnet_port

dependencies = ["numpy", "platformdirs", "safetensors", "torch"]


def soundnet8(pretrained: bool = True, device: str = "cpu") -> "_soundnet_port.SoundNet":
    """The 8-layer network, with the weights that `load_pretrained("soundnet8")` finds, or random ones."""
    return _made("soundnet8", pretrained, device)


def soundnet5(pretrained: bool = True, device: str = "cpu") -> "_soundnet_port.SoundNet":
    """The 5-layer network, with the weights that `load_pretrained("soundnet5")` finds, or random ones."""
    return _made("soundnet5", pretrained, device)


def demo(device: str = "cpu") -> "_soundnet_port.SoundNet":
    """The small network that comes along: eight layers, trained on ten kinds of sound."""
    return _soundnet_port.load_pretrained("demo", device)


def _made(name: str, pretrained: bool, device: str) -> "_soundnet_port.SoundNet":
    if pretrained:
        return _soundnet_port.load_pretrained(name, device)
    architecture = {"soundnet8": _soundnet_port.SOUNDNET8, "soundnet5": _soundnet_port.SOUNDNET5}[name]
    return _soundnet_port.SoundNet(architecture).to(device)
