"""The one error of this package that is for its user, not its author."""


class Failure(Exception):  # noqa: N818  # nothing is wrong with the program
    """What went wrong outside of the program, in one line that names the file or setting and the remedy."""
