"""Run the tests of another library with the losses of fastpref in place of its own.

python -m benchmarks.peer_suites SUITE FOLDER [OPTIONS]       SUITE: trl, liger or cce

FOLDER is a checkout of that library; `SUITE --help` says which part of it is run.
"""

from __future__ import annotations

import sys
from importlib import import_module

SUITES = ("trl", "liger", "cce")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in SUITES:
        raise SystemExit(__doc__)
    import_module(f"benchmarks.peer_suites.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
