"""One base class for all errors that the package raises on purpose, and one for its warnings."""

import importlib
import inspect
import pkgutil

import pytest

import soundnet_port
from soundnet_port import conversion
from soundnet_port.errors import MissingExtraError, SoundNetError, SoundNetWarning

INTERNAL = {
    "DecodeError",
    "UnknownFormatError",
    "_CannotSeek",
    "InputError",
    "OutputError",
    "SessionClosed",
    "UsageError",
}  # always caught inside the package


def modules():
    for package in (soundnet_port, conversion):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.rpartition(".")[2] not in (
                "__main__",
                "hub",
                "ray_backend",
                "shipped",
                "_kernels",
            ):
                yield importlib.import_module(module.name)


def test_all_errors_and_warnings_have_their_base_class():
    for module in modules():
        for name, member in inspect.getmembers(module, inspect.isclass):
            is_error = issubclass(member, Exception) and member.__module__ == module.__name__
            if is_error and issubclass(member, Warning):
                assert issubclass(member, SoundNetWarning), f"{module.__name__}.{name}"
            elif is_error and name not in INTERNAL:
                assert issubclass(member, SoundNetError), f"{module.__name__}.{name}"
                assert issubclass(member, ValueError)


def test_a_missing_extra_is_an_import_error_too():
    with pytest.raises(ImportError, match=r"^onnx is not installed: pip install 'soundnet-port\[onnx\]'$"):
        raise MissingExtraError("onnx", "onnx")
