"""The stages of a call: found at a pipeline's methods, timed, verified, added to, cancelled and overlapped."""

from pipeboost.stages.spans import Progress
from pipeboost.stages.stage import Checks, FailedCheck, Stage, StageParallelism

__all__ = ["Checks", "FailedCheck", "Progress", "Stage", "StageParallelism"]
