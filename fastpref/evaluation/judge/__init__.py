"""`fastpref judge`: compare the answers of two models pair by pair, by a chat or a reward model."""
