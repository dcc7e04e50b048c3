"""Test suites of other libraries, run with the losses of fastpref in place of theirs."""
