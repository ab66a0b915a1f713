"""Builds the compiled page copier; everything else is in pyproject.toml.

The library has a plain C interface and is loaded with ctypes, so it needs a C++17
compiler (``CXX`` is respected) but no Python headers. Where there is none, the
package installs without it and the NumPy twin runs instead.
"""

from setuptools import Extension, setup

PAGES = Extension(
    "lmcache_ext.ops._pages",
    sources=["lmcache_ext/ops/csrc/pages.cpp"],
    language="c++",
    extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"],
    optional=True,
)

setup(ext_modules=[PAGES])
