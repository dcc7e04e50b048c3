"""Graded advice: several responses to each prompt, of several lengths, with scores in [0, 1].

The data set imitates human feedback with known ground truth. A response consists of two to four
steps, each with a verb, a thing and an adverb; every verb and adverb has a latent utility
u ~ N(0, 1), and

    quality = mean utility of the words · √2 + ε,    score = σ(quality),    ε ~ N(0, noise²),

so the score depends on the words and not on the length, and a policy trained on some prompts
generalizes to others up to ε. The groups serve every kind of objective: as groups, as pairs of the
best and the worst response, or as the responses of these pairs with a label each.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

Record = dict[str, Any]

TASKS = (
    "build a bookshelf", "bake a cake", "plant a tree", "repair a bicycle", "paint a wall",
    "clean a carpet", "train a puppy", "write a letter", "pack a suitcase", "light a fire",
    "sew a shirt", "brew some beer", "grow tomatoes", "wash a car", "plan a party",
    "learn a song", "choose a laptop", "sharpen a knife", "hang a picture", "mend a roof",
    "cook some rice", "draw a map", "catch a fish", "tune a guitar", "start a garden",
    "fold a paper crane", "polish a table", "press some flowers", "knit a scarf", "make a kite",
)  # fmt: skip
CIRCUMSTANCES = (
    "at home", "with children", "in the rain", "without any help", "on a small budget",
    "in an hour", "for the first time", "before winter", "in a small flat", "as a gift",
    "without much noise", "with old tools", "in the evening", "for a friend", "on my own",
    "during a holiday", "after work", "with one hand", "by the sea", "in the dark",
)  # fmt: skip
OPENERS = ("First,", "Next,", "Then,", "Finally,")
VERBS = (
    "measure", "check", "clean", "sort", "heat", "cool", "mark", "trim", "soak", "dry",
    "weigh", "press", "shake", "cover", "open", "turn", "mix", "count", "lift", "test",
)  # fmt: skip
THINGS = (
    "wood", "water", "paper", "soil", "cloth", "metal", "paint", "thread", "stone", "glass",
    "wire", "sand", "rope", "oil", "salt", "wax", "glue", "clay", "leaves", "string",
)  # fmt: skip
ADVERBS = (
    "carefully", "quickly", "slowly", "twice", "gently", "firmly", "evenly", "daily", "outside",
    "quietly", "again", "loosely", "fully", "partly", "early", "late", "alone", "together",
    "briefly", "well",
)  # fmt: skip
RESPONSES = 4
_STEP = re.compile(rf"(?:{'|'.join(OPENERS)}) (\w+) the (?:{'|'.join(THINGS)}) (\w+)\.")


def groups(count: int, seed: int = 0, noise: float = 0.5, per_prompt: int = 1) -> list[Record]:
    """Generate rows `prompt, completions[4], scores[4]`; equal arguments give equal rows.

    count: number of prompts, each with `per_prompt` rows of responses of their own.
    noise: standard deviation of ε, in the units of the utilities.
    Raises ValueError if `count` exceeds the number of prompts.
    """
    prompts = [
        f"User: How do I {task} {how}?\nAssistant:" for task in TASKS for how in CIRCUMSTANCES
    ]
    if not 0 < count <= len(prompts):
        raise ValueError(f"count: expected 1 to {len(prompts)}, got {count}; lower it")
    rng, utility = random.Random(f"responses {seed}"), _utilities(seed)
    rng.shuffle(prompts)
    return [
        _group(prompt, rng, utility, noise) for prompt in prompts[:count] for _ in range(per_prompt)
    ]


def _group(prompt: str, rng: random.Random, utility: dict[str, float], noise: float) -> Record:
    completions, scores = [], []
    for _ in range(RESPONSES):
        steps = rng.randint(2, 4)
        words = [(rng.choice(VERBS), rng.choice(THINGS), rng.choice(ADVERBS)) for _ in range(steps)]
        sentences = (
            f" {opener} {verb} the {thing} {adverb}."
            for opener, (verb, thing, adverb) in zip(OPENERS, words, strict=False)
        )
        utilities = [utility[word] for verb, _, adverb in words for word in (verb, adverb)]
        completions.append("".join(sentences))
        logit = _mean_utility(utilities) + noise * rng.gauss(0, 1)
        scores.append(round(1 / (1 + math.exp(-logit)), 4))
    return {"prompt": prompt, "completions": completions, "scores": scores}


@cache
def _utilities(seed: int) -> dict[str, float]:
    rng = random.Random(f"utilities {seed}")
    return {word: rng.gauss(0, 1) for word in VERBS + ADVERBS}


def _mean_utility(utilities: list[float]) -> float:
    return math.fsum(utilities) / len(utilities) * math.sqrt(2)


def pairs(rows: Iterable[Record]) -> list[Record]:
    """Best and worst response of each group as `prompt, chosen, rejected`; ties are dropped."""
    pairs = []
    for row in rows:
        ranked = sorted(zip(row["scores"], row["completions"], strict=True))
        (low, rejected), (high, chosen) = ranked[0], ranked[-1]
        if low < high:
            pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return pairs


def top(rows: Iterable[Record], count: int) -> list[Record]:
    """Groups reduced to `count` responses: the best `count - 1` and the worst."""
    reduced = []
    for row in rows:
        ranked = sorted(zip(row["scores"], row["completions"], strict=True), reverse=True)
        selected = ranked[: count - 1] + ranked[-1:]
        scores, completions = map(list, zip(*selected, strict=True))
        reduced.append({"prompt": row["prompt"], "completions": completions, "scores": scores})
    return reduced


def singles(rows: Iterable[Record]) -> list[Record]:
    """Both responses of each pair as rows `prompt, completion, label`."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs(rows)
        for side in ("chosen", "rejected")
    ]


def quality(text: str, seed: int = 0) -> float | None:
    """Noise-free quality of a response, or None if it is not a sequence of steps.

    It scores the samples of a model that was trained on `groups(…, seed)`.
    """
    steps = [_STEP.fullmatch(part) for part in re.split(r"(?<=\.) ", text.strip())]
    if not all(steps):
        return None
    utility = _utilities(seed)
    utilities = [utility.get(word) for step in steps if step for word in step.groups()]
    if None in utilities:
        return None
    return _mean_utility([u for u in utilities if u is not None])
