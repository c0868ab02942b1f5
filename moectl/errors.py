"""The errors users meet. Each says what is wrong, why it matters and what to do, and owns an exit code.

Libraries raise these and never print or exit; `moectl.cli.main` turns them into three lines on stderr.
Anything else that escapes is a bug in moectl and exits with 1 and a traceback.
"""

from __future__ import annotations


class MoectlError(Exception):
    """An expected failure: `what` is wrong, `why` it matters, how to `fix` it."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix

    def lines(self) -> list[str]:
        """The message as one to three lines, empty parts left out."""
        return [part for part in (self.what, self.why, self.fix) if part]


class UsageError(MoectlError):
    """The command line cannot be carried out as given, or its output already exists (exit 2)."""

    exit_code = 2


class InputError(MoectlError, ValueError):
    """A checkpoint, recipe or data file cannot be used (exit 3)."""

    exit_code = 3


class MachineError(MoectlError):
    """The disk, memory, device, network or Hub cannot do it (exit 4)."""

    exit_code = 4


class SaidElsewhere(MoectlError):
    """Another process of the same run failed and says why: this one ends with that exit code, in silence."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("Another process of this run failed, and says why.")
        self.exit_code = exit_code

    def lines(self) -> list[str]:
        """Nothing."""
        return []


class CheckFailed(MoectlError):
    """A verification or a gate failed (exit 5)."""

    exit_code = 5
