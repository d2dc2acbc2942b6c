"""What setup.cfg can't say: the optional kernels, a plain library, independent of Python's version."""

import os

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FOLDER = "soundnet_port/network/kernels"


class BuildKernels(build_ext):
    """Build a library for ctypes; without a compiler the package goes without."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file as library.py looks for it, without a tag of Python's version."""
        return fullname.replace(".", os.sep) + (".dll" if os.name == "nt" else ".so")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """Export no module initializer."""
        return ["soundnet_kernels_1"]


class PlatformWheel(bdist_wheel):
    """Tag the wheel for a platform and any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "soundnet_port.network.kernels._kernels",
            [f"{FOLDER}/kernels.cpp"],
            depends=[f"{FOLDER}/lanes.h"],
            extra_compile_args=[
                "-O3",
                "-std=gnu++17",
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-Wno-psabi",
                "-g0",
            ],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
