"""One module for each paper, with a `STUDY`."""
