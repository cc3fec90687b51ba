"""The base of every error that is meant for the user."""


class UserError(ValueError):
    """The user can mend this: the message is one sentence that says what is wrong, where, and what
    to do. A program shows it without a traceback; any other exception is a defect of the program.
    """
