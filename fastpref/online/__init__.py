"""Objectives on the policy's own samples: PPO, RLOO, GRPO, Nash-MD, and their learner."""
