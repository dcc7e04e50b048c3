"""The policy: loading, adapters, sharding, packed attention, reference log-probs, export."""
