"""The one error of this package that is for its user, not its author."""


class Failure(Exception):  # noqa: N818  # nothing is wrong with the program
    """An error outside the program, told in one line that names the file or setting and the remedy.

    Example:
      >>> from jaxnorm import training
      >>> try:
      ...     training.load_mnist("/nowhere")
      ... except training.Failure as failure:
      ...     print(str(failure).partition(" expected ")[0], str(failure).rpartition("; ")[2])
      load_mnist: /nowhere: found no such folder.
    """
