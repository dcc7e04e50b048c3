"""`fastpref rounds`: lock the run directory, load what stays in memory, play the rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastpref import distributed
from fastpref.config import Config
from fastpref.losses import Objective
from fastpref.losses.rollout import DistillationOptions
from fastpref.rounds.checks import check
from fastpref.rounds.distillation_learner import DistillationLearner
from fastpref.rounds.learner import Learner
from fastpref.rounds.pair_learner import PairLearner
from fastpref.rounds.rollout_learner import RolloutLearner
from fastpref.rounds.scorers import check_scorer
from fastpref.rounds.scoring import Scorer
from fastpref.rounds.sequence import Rounds
from fastpref.rounds.session import Session
from fastpref.training import base_weights, rank_checks, run_lock, signals
from fastpref.training.setup import claim
from fastpref.utils.atomic_files import clear_leftovers
from fastpref.utils.errors import UserError
from fastpref.utils.progress import Display


def run(
    config: Config,
    display: Display,
    received: list[int] | None = None,
    scorer: Callable[[], Scorer] | None = None,
    make_learner: Callable[[Rounds], Learner] | None = None,
) -> Path:
    """Play all rounds of a config and return the folder of the exported model.

    received: gets the first signal. scorer: makes the scorer; default: the config's.
    make_learner: makes what takes the steps; default: the learner of the objective.

    Raises UserError in one line, and Interrupted after SIGTERM or Ctrl-C.
    """
    check(config)
    rank_checks.check_same_config([config])
    folder = Path(config.training.output_dir)
    with run_lock.hold(folder):
        checkpoint = claim(folder, config.resume, display)
        if checkpoint is not None:
            base_weights.check(checkpoint, config)
        if distributed.is_main_process():
            for leftovers in (folder / "rounds", *folder.glob("rounds/*")):
                clear_leftovers(leftovers)
        if scorer is None:
            assert config.rounds is not None
            # The policy may take minutes to load.
            options = config.rounds.scorer
            distributed.on_main_process(lambda: check_scorer(options, display))
        with signals.collecting(received) as signums:
            session = Session(config, display, folder if checkpoint is not None else None)
            rounds = Rounds(session, checkpoint, signums, scorer)
            try:
                return rounds.play(make_learner or _learner_of(session.loss))
            except UserError:
                rounds.close()  # the process may go on with another run
                raise


def _learner_of(loss: Objective) -> Callable[[Rounds], Learner]:
    if isinstance(loss, DistillationOptions):
        return DistillationLearner
    return RolloutLearner if loss.of_rollouts else PairLearner
