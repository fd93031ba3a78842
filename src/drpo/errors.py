"""Mistakes in what the user gave, as opposed to bugs."""


class UserError(Exception):
    """A mistake in a recipe, a file or an option; its message is one line that says where, what, and what was expected.

    The command line prints the message and exits with 2.
    """
