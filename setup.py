"""Builds `bmc_core._native`: one translation unit per instruction set, each with its own flags.

Everything else about the distribution stands in pyproject.toml.
"""

import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

CSRC = Path("bmc_core", "csrc")
COMMON = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# gcc 12 warns about its own header: masked intrinsics pass an operand that is undefined on purpose.
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# What may run only after CPUID has been asked. Every other file is built for the plain machine.
ISA_FLAGS = {
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "isa_amx_bf16.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "sampling_avx2.cpp": AVX2,
    "sampling_avx512.cpp": AVX512,
}
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def sources() -> list[str]:
    """Every .cpp of csrc but those of instruction sets that the target machine family lacks."""
    return [
        str(path) for path in sorted(CSRC.glob("*.cpp")) if IS_X86 or path.name not in ISA_FLAGS
    ]


class BuildExt(build_ext):
    """setuptools gives one flag list to all sources; instruction sets need one each."""

    def build_extensions(self) -> None:
        plain_compile = self.compiler._compile

        def compile_one(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = [*extra_postargs, *ISA_FLAGS.get(Path(src).name, [])]
            return plain_compile(obj, src, ext, cc_args, flags, pp_opts)

        self.compiler._compile = compile_one
        super().build_extensions()


setup(
    ext_modules=[
        Pybind11Extension(
            "bmc_core._native",
            sources(),
            depends=[str(path) for path in sorted(CSRC.glob("*.h"))],
            define_macros=[("BMC_X86", "1")] if IS_X86 else [],
            extra_compile_args=COMMON,
            extra_link_args=["-fopenmp"],
            cxx_std=17,
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
