"""Entry points of torch.hub: torch.hub.load("path/to/clone", "demo", source="local"). See docs/hubs.md."""

import soundnet_port as _soundnet_port

dependencies = ["numpy", "platformdirs", "safetensors", "torch"]


def soundnet8(pretrained: bool = True, device: str = "cpu") -> "_soundnet_port.SoundNet":
    """Return the 8-layer network, with the weights of `load_pretrained("soundnet8")` or random ones."""
    return _load("soundnet8", pretrained, device)


def soundnet5(pretrained: bool = True, device: str = "cpu") -> "_soundnet_port.SoundNet":
    """Return the 5-layer network, with the weights of `load_pretrained("soundnet5")` or random ones."""
    return _load("soundnet5", pretrained, device)


def demo(device: str = "cpu") -> "_soundnet_port.SoundNet":
    """Return the small demonstration network: eight layers, trained on ten kinds of sound."""
    return _soundnet_port.load_pretrained("demo", device)


def _load(name: str, pretrained: bool, device: str) -> "_soundnet_port.SoundNet":
    if pretrained:
        return _soundnet_port.load_pretrained(name, device)
    architecture = {"soundnet8": _soundnet_port.SOUNDNET8, "soundnet5": _soundnet_port.SOUNDNET5}[name]
    return _soundnet_port.SoundNet(architecture).to(device)
