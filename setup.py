"""Builds the CPU kernel where there is a C++ compiler; everything else about the package stands in pyproject.toml.

The kernel is optional: without a compiler the install succeeds, and its first use warns what that costs.
"""

from setuptools import Extension, setup

KERNEL = "src/offramp/_kernel"

setup(ext_modules=[Extension(
    "offramp._kernel._native",
    sources=[f"{KERNEL}/{name}.cpp" for name in ("kernel", "geometry", "portable", "avx2", "avx512", "avx512_bf16",
                                              "amx_bf16", "proof")],
    depends=[f"{KERNEL}/{name}.hpp" for name in ("kernel", "body", "vector", "conv", "tiles", "sum", "sure")],
    language="c++",
    extra_compile_args=["-std=gnu++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"],
    optional=True,
)])
