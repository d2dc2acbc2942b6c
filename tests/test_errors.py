"""Errors: one base class for all that the package raises by intention."""

import importlib
import inspect
import pkgutil

import pytest

import soundnet_port
from soundnet_port import conversion
from soundnet_port.errors import MissingExtraError, SoundNetError

LOCAL = {
    "_Unreadable",
    "_UnknownFormat",
    "_Gone",
    "_CannotSeek",
    "InputError",
    "OutputError",
    "UsageError",
}  # never leave it


def modules():
    for package in (soundnet_port, conversion):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.rpartition(".")[2] not in ("__main__", "hub", "ray_backend", "shipped"):
                yield importlib.import_module(found.name)


def test_whoever_catches_the_base_class_catches_all_of_them():
    for module in modules():
        for name, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, Exception) and member.__module__ == module.__name__ and name not in LOCAL:
                assert issubclass(member, SoundNetError), f"{module.__name__}.{name}"
                assert issubclass(member, ValueError)


def test_a_missing_extra_is_an_import_error_too():
    with pytest.raises(ImportError, match=r"^onnx is not installed: pip install 'soundnet-port\[onnx\]'$"):
        raise MissingExtraError("onnx", "onnx")
