"""Mistakes in what the user gave, as opposed to bugs."""

from importlib.util import find_spec

from drpo.redact import redact


class UserError(Exception):
    """A mistake in a recipe, a file or an option; its message is one line that says where, what, and what was expected.

    The command line prints the message and exits with 2.

    Args:
        message: what is wrong.
        fix: what to write instead, for ``drpo doctor``, where the message does not end in it.
    """

    LONGEST = 1000

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        # What the user gave is quoted in it, line breaks and megabytes included.
        # A secret is hidden before it may be cut in two.
        line = redact(" ".join(message.split())[: 2 * self.LONGEST])
        super().__init__(line if len(line) <= self.LONGEST else line[: self.LONGEST] + "...")
        self.fix = fix and redact(fix)

    @property
    def lines(self) -> list[str]:
        """The message; more than one line where several rows of a file are wrong."""
        return [str(self)]


class MissingExtraError(UserError, ImportError):
    """A package is not installed that one of this library's extras brings. The message names the extra."""


def require_extra(extra: str, whatever: str) -> None:
    """Refuse to go on without the package that an extra is named for.

    Args:
        extra: of this library.
        whatever: needs the package.
    """
    if find_spec(extra) is None:
        raise MissingExtraError(f"{whatever}: {extra} is not installed; expected pip install 'drpo[{extra}]'")


class TrainingStoppedError(RuntimeError):
    """Training ended by itself, since going on would train on something wrong. The message says what, in a line or a list."""


class TrainingInterruptedError(SystemExit):
    """A signal ended training; the exit code is 128 and the signal's number. What can be resumed was saved and said."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class RewardError(UserError, TrainingStoppedError):
    """A reward function failed: it raised, took too long, or returned something else than scores. The message names it."""


class WriteError(UserError, TrainingStoppedError):
    """A file cannot be written, as on a full disk. The message names it."""
