"""Rows of scored completions, in the schema of UltraFeedback and others."""

from __future__ import annotations

from typing import Any

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")


def completion(text: str, overall: Any, ratings: Any) -> dict[str, Any]:
    """A completion as UltraFeedback has it; its ratings are text, one for all aspects or four."""
    four = ratings if isinstance(ratings, tuple) else (ratings,) * 4
    return {
        "annotations": {
            aspect: {"Rating": str(rating), "Rationale": "because", "Type": ["1"]}
            for aspect, rating in zip(ASPECTS, four, strict=True)
        },
        "critique": "It could be better.",
        "custom_system_prompt": "As an AI assistant, be helpful.",
        "fine-grained_score": 0.0,
        "model": "gpt-4",
        "overall_score": overall,
        "principle": "helpfulness",
        "response": text,
    }


def ultrafeedback(
    instruction: str, *completions: dict[str, Any], source: str = "flan"
) -> dict[str, Any]:
    """A row of openbmb/UltraFeedback."""
    return {
        "source": source,
        "instruction": instruction,
        "models": [c.get("model") for c in completions],
        "completions": list(completions),
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def groups(count: int) -> list[dict[str, Any]]:
    """Groups of four completions with the scores 0, 1, 2 and 3."""
    return [
        {
            "prompt": f"Question {i}?",
            "completions": [f" {name} {i}" * (k + 1) for k, name in enumerate("abcd")],
            "scores": [0, 3, 1, 2],
        }
        for i in range(count)
    ]
