"""Why the line of a pair is not flat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..alignment import Alignment
from ..budget.devices import require_device
from ..engine.model import require_task
from ..errors import LmcError
from ..evaluation.advice import advise
from ..evaluation.diagnosis import Diagnosis, diagnose_weights
from ..examples import Data
from ..pair import Pair
from ..symmetry import Transform, canonicalize
from .evaluate import require_fitting
from .held_out import evenly
from .placing import placed
from .progress import Cancel, Progress, Watch

SEQUENCES = 16


def diagnose(
    pair: Pair,
    tokens: Data,
    alignment: Alignment | None = None,
    *,
    sequences: int = SEQUENCES,
    device: torch.device | str = "cpu",
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> Diagnosis:
    """Looks at the middle of the line between both checkpoints, block by block. Four models are held in float32, and
    their streams of the sample behind every block.

    Args:
        pair: the endpoints.
        tokens: held-out data, as for `align`.
        alignment: by which they are aligned first; None: as they are.
        sequences: inputs that are taken at most, by default 16, spread evenly.
        device: where to compute.
        progress: called in every stage, see Progress.
        cancel: called, or a threading.Event looked at, then; True ends the work.

    Returns:
        What was found, with advice.

    Raises:
        LmcError: the alignment is of other models, the model has no loss, or numbers overflow.
        Cancelled: `cancel` says so.

    >>> pair = lmc.open_pair("A", "B")
    >>> found = lmc.diagnose(pair, lmc.read_tokens("held-out.txt", pair.a, 16), sequences=4)
    >>> len(found.blocks), all(isinstance(sentence, str) for sentence in found.advice)
    (2, True)
    """
    require_task(pair.spec)
    if alignment is not None:
        require_fitting(pair, alignment)
    device = require_device(device)
    if isinstance(sequences, bool) or not isinstance(sequences, int) or sequences < 1:
        raise LmcError(f"sequences must be a positive whole number, not {sequences!r}")
    watch = Watch(progress, cancel)
    pair = placed(pair, tokens, device, alignment.info.get("grown") if alignment else None)
    watch.begin("diagnosing", pair.spec.layers)
    a, raw = (canonicalize(model.load(torch.float32, device)) for model in (pair.a, pair.b))
    b, relative = raw, Transform.identity(pair.spec)
    if alignment is not None:
        relative = alignment.a.inverse().compose(alignment.b)
        b = relative.apply(raw)
    found = diagnose_weights(a, b, raw, relative, evenly(tokens, sequences).to(device), watch.at)
    return replace(found, advice=advise(found, pair.spec, alignment is not None))
