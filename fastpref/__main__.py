"""`python -m fastpref …` is `fastpref …`; `torchrun -m fastpref` needs this form."""

from fastpref.cli import main

if __name__ == "__main__":
    main()
