"""The one error that users are meant to read."""


class InputError(ValueError):
    """Something the user gave (data, configuration, a path) cannot be used.

    The message is one line that names the place and says what to do; recipes print it without a traceback
    and exit with status 2.
    """
