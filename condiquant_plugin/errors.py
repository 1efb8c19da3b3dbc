"""Errors that a user can act on."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: the value and the remedy."""


class DistributedError(RuntimeError):
    """Another process ended or failed; the message is one line: what was being done and the remedy."""
