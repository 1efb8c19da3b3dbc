"""Errors that a user can act on."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: the value and the remedy."""
