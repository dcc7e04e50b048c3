"""One module a paper, each with a `STUDY`."""
