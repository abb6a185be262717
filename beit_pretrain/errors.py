"""What can go wrong through no fault of the code: the command line prints these without a traceback."""

from __future__ import annotations

from collections.abc import Sequence

from beit_pretrain.wording import printable


class BeitError(Exception):
    """A mistake that a user can mend: says what was given, what was needed and what to set.

    It is one line, whatever the names in it that come from outside. `code` is the exit code of a command that it ends.
    """

    code = 2

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(BeitError):
    """One or more faults in the configuration, found before anything was built."""

    def __init__(self, faults: Sequence[str] | str) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))

    def __str__(self) -> str:
        return "\n".join(map(printable, self.faults))


class DataError(BeitError):
    """Images, labels or folders that cannot be used."""


class LabelError(DataError):
    """A label that is no class: the classes are wrong, not the file, so it is never passed over as unreadable."""


class CheckpointError(BeitError):
    """A file that is no checkpoint, or not the one that is needed."""


class DownloadError(BeitError):
    """A file that could not be fetched, or arrived damaged."""


class WorkerError(BeitError):
    """A process that loads data was killed: the command may be right, and a search tries the next one."""

    code = 1


class TrainingError(BeitError):
    """A run that cannot go on, such as one whose loss stays NaN."""


class LockLost(BeitError):
    """Another process has taken over the folder that this run was writing into, or somebody has removed it."""

    code = 1
