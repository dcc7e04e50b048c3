"""Measure models after training: on pairs, by samples, by DID entropy."""
