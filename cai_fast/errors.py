"""Errors that are the user's to fix: one message, exit code 2, before any work starts."""


class InputError(ValueError):
    """Bad input: a setting, file, checkpoint or run folder that cannot be used as it is.

    The message names the thing, what was expected, what was found, and the remedy.
    """
