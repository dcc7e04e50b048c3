"""Entry point of `python -m fastpref` and `torchrun -m fastpref`; same as `fastpref`."""

from fastpref.cli import main

if __name__ == "__main__":
    main()
