"""The base class of errors that are meant for the user."""


class UserError(ValueError):
    """An error that the user can fix.

    The message is one sentence: what is wrong, where, and what to do. A program prints it without a
    traceback; any other exception is a defect of the program.
    """
