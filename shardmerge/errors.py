"""Every exception that shardmerge raises on purpose.

    ShardmergeError              exit 1   something that a user can mend; its message says how
    ├── RecipeError              exit 2   the recipe is wrong; carries every problem that was found
    ├── UsageError               exit 2   the command line is wrong
    ├── CheckpointError          exit 1   an input checkpoint cannot be read as it is
    │   └── HeaderError          exit 1   a safetensors header breaks the format
    ├── DataError                exit 1   examples that a model is to be run on cannot be used
    ├── PlanError                exit 1   the recipe and these checkpoints do not fit together
    │   └── MemoryBudgetError    exit 1   a task cannot fit the memory budget
    ├── NonFiniteError           exit 1   an input or a result holds NaN or infinity
    ├── StoreError               exit 1   bytes could not be read or written
    │   └── SourceChangedError   exit 1   an input changed while it was being merged
    ├── OutputError              exit 1   the output place cannot be used
    │   ├── LockedError          exit 1   another run is writing there
    │   ├── LedgerMismatchError  exit 1   the unfinished run there is another's
    │   └── PartsMissingError    exit 1   slices have not written all that is to be published
    ├── StateError               exit 1   a state of continual merging cannot take this step
    ├── ClusterError             exit 1   a cluster cannot do the work, or has failed at it
    ├── DeviceError              exit 1   a CUDA device failed, or its memory does not suffice
    ├── VerifyError              exit 1   a published checkpoint is not what its provenance says
    └── Stopped                  exit 3   stopped by the user; the same command goes on from here

Anything else that escapes is a bug of shardmerge, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class ShardmergeError(Exception):
    """Base of all errors for users. ``exit_code`` is the process's exit status."""

    exit_code = 1


class RecipeError(ShardmergeError):
    """A recipe that cannot be merged; ``problems`` lists everything found wrong."""

    exit_code = 2

    def __init__(self, problems: Sequence[str] | str) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class UsageError(ShardmergeError):
    """A command line that asks for something that does not exist."""

    exit_code = 2


class CheckpointError(ShardmergeError):
    """An input checkpoint that is missing, damaged, or of a kind that is not supported."""


class HeaderError(CheckpointError):
    """A safetensors header that breaks the format."""


class DataError(ShardmergeError):
    """Examples that are missing, damaged, or that a model cannot be asked about."""


class PlanError(ShardmergeError):
    """A recipe and checkpoints that do not fit together (shapes, dtypes, missing tensors)."""


class MemoryBudgetError(PlanError):
    """A task that cannot be done within the memory budget."""


class NonFiniteError(ShardmergeError):
    """NaN or infinity in an input or a result."""


class StoreError(ShardmergeError):
    """Bytes that could not be read or written."""


class SourceChangedError(StoreError):
    """An input that changed after the plan was made."""


class OutputError(ShardmergeError):
    """An output place that cannot be used: occupied, read-only, full."""


class LockedError(OutputError):
    """An output place that another run is writing to."""


class LedgerMismatchError(OutputError):
    """An unfinished run of another recipe, or of changed sources."""


class PartsMissingError(OutputError):
    """Parts that slices have not written yet."""


class StateError(ShardmergeError):
    """A step that a state of continual merging cannot take."""


class ClusterError(ShardmergeError):
    """A cluster that cannot do the work, or that failed at it too often."""


class DeviceError(ShardmergeError):
    """A CUDA device that failed, or whose memory does not suffice."""


class VerifyError(ShardmergeError):
    """A published checkpoint that is not what its provenance record says."""


class Stopped(ShardmergeError):
    """The run was stopped and can be resumed by the same command."""

    exit_code = 3
