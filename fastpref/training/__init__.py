"""The training loop, and all that a step, a checkpoint and a run need."""
