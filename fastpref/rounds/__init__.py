"""Rounds of preference training: sample, score, pair, train, and again with the new policy."""
