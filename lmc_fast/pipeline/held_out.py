"""What a run is judged by: held-out data, and what the endpoints' own losses on it say."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..architectures import Spec
from ..examples import Data
from ..learning.learner import Learner
from ..members import member_names

SEQUENCES = 64  # of the held-out data that learning is validated on, and of the calibration data beside them
UNIFORM = 0.9  # of log(vocabulary): an endpoint with such a loss predicts next to nothing
FEWEST = 16  # of these sequences, in short runs
PER_SEQUENCE = 8  # sequences learned from for each that a state is judged by: ten judgements cost less than learning
MEMORISED = 0.2  # nats by which an endpoint is better on calibration data


def evenly(data: Data, count: int = SEQUENCES) -> Data:
    """At most `count` sequences, spread over all of them."""
    return data[:: max(1, len(data) // count)][:count]


def judging(data: Data, learned_from: int) -> Data:
    """The part of `data` that states are judged by in a run that learns from so many sequences."""
    return evenly(data, min(SEQUENCES, max(FEWEST, learned_from // PER_SEQUENCE)))


def useless_endpoints(spec: Spec, losses: Sequence[float]) -> list[str]:
    """A sentence on each endpoint whose held-out loss is near that of guessing. losses: nats per prediction."""
    guessing = math.log(spec.vocab)
    return [
        f"endpoint {name} predicts next to nothing of the held-out data (loss {loss:.2f} nats, guessing among "
        f"{spec.vocab} gives {guessing:.2f}): look whether its weights, tokenizer and data belong together"
        for name, loss in zip(map(str.upper, member_names(len(losses))), losses, strict=True)
        if loss > UNIFORM * guessing
    ]


def memorised(learner: Learner, losses: Sequence[float]) -> list[str]:
    """A sentence where the endpoints know the calibration data far better than held-out data with these `losses`."""
    known = learner.corner_losses(evenly(learner.tokens))
    gap = min(loss - seen for loss, seen in zip(losses, known, strict=True))
    if gap < MEMORISED:
        return []
    return [
        f"the endpoints' loss on the calibration data is {gap:.2f} nats or more below that on the held-out data: they "
        "seem to have been trained on it, and data that they have not seen gives a flatter line"
    ]
