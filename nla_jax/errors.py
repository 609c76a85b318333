"""The one exception that reaches a user as a sentence."""


class InputError(ValueError):
    """A user's input is wrong; the message is one clear sentence: what is wrong, where, what to do."""
