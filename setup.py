"""Build the row passes in C++ (`fastpref/ops/_rows*.so`); without a compiler, go without.

It is a plain shared library, loaded with ctypes: it includes neither Python's headers nor torch's.
"""

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError


class BuildLibrary(build_ext):
    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            # Apple's compiler has no OpenMP; one thread still saves most of the memory traffic.
            for options in (ext.extra_compile_args, ext.extra_link_args):
                options.remove("-fopenmp")
            super().build_extension(ext)

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # there is no PyInit__rows


setup(
    cmdclass={"build_ext": BuildLibrary},
    ext_modules=[
        Extension(
            "fastpref.ops._rows",
            ["csrc/cpu/rows.cpp"],
            language="c++",
            optional=True,  # a failure is a warning
            extra_compile_args=[
                *("-std=gnu++17", "-O3", "-fopenmp", "-ffp-contract=fast"),
                *("-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-Wno-psabi", "-g0"),
            ],
            extra_link_args=["-fopenmp"],
        )
    ],
)
