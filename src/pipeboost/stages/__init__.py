"""The stages of a call: found at a pipeline's doors, timed, verified, added to, cancelled and overlapped."""

from pipeboost.stages.admission import TURN
from pipeboost.stages.call_record import FinishedCall, latest_after, unreported, with_what_finished
from pipeboost.stages.composition import TEXT_ENCODING, Composition
from pipeboost.stages.instrument import watch, watched_components
from pipeboost.stages.overlap import current_turn, one_by_one, overlapped
from pipeboost.stages.report import Report, weights_of
from pipeboost.stages.spans import RECORDER, WHOLE_CALL, Progress, Recorder, Span
from pipeboost.stages.stage import Checks, FailedCheck, Stage, StageParallelism, StageVerificationError, verified
from pipeboost.stages.stage_middleware import COMPOSITION
from pipeboost.stages.trajectory import Trajectory, follow_trajectory, with_trajectory, without_trajectory

__all__ = [
    "COMPOSITION",
    "RECORDER",
    "TEXT_ENCODING",
    "TURN",
    "WHOLE_CALL",
    "Checks",
    "Composition",
    "FailedCheck",
    "FinishedCall",
    "Progress",
    "Recorder",
    "Report",
    "Span",
    "Stage",
    "StageParallelism",
    "StageVerificationError",
    "Trajectory",
    "current_turn",
    "follow_trajectory",
    "latest_after",
    "one_by_one",
    "overlapped",
    "unreported",
    "verified",
    "watch",
    "watched_components",
    "weights_of",
    "with_trajectory",
    "with_what_finished",
    "without_trajectory",
]
