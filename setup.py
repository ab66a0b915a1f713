"""Builds the compiled loops; everything else is in pyproject.toml.

The libraries have plain C interfaces and are loaded with ctypes, so they need a C++17
compiler (``CXX`` is respected) but no Python headers. Where there is none, the package
installs without them: the NumPy twin copies pages, and serdes other than naive say that
they are missing.
"""

from setuptools import Extension, setup

CSRC = "lmcache_ext/ops/csrc"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-ffp-contract=off",
    "-fno-trapping-math",  # nobody looks for floating-point exceptions, and without it gcc makes fewer vectors
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
]


def library(name: str, depends: tuple[str, ...] = ()) -> Extension:
    """``lmcache_ext/ops/_NAME.so`` from ``csrc/NAME.cpp``; headers in `depends` make it build anew."""
    return Extension(
        f"lmcache_ext.ops._{name}",
        sources=[f"{CSRC}/{name}.cpp"],
        depends=[f"{CSRC}/{header}" for header in depends],
        language="c++",
        extra_compile_args=FLAGS,
        optional=True,
    )


setup(
    ext_modules=[
        library("pages", ("pages.h", "stream.h")),
        library("pages_fp8", ("device.h", "e4m3.h", "elements.h", "pages.h", "pages_fp8.h", "stream.h")),
        library("lossless", ("isa.h", "rans.h", "rans_model.h")),
        library("fixed", ("device.h", "e4m3.h", "elements.h", "fixed.h", "isa.h", "kivi.h")),
        library("cachegen", ("cachegen.h", "device.h", "elements.h", "isa.h", "models.h", "rans.h", "rans_model.h")),
    ]
)
