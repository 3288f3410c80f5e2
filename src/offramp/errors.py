"""What can go wrong, said once and in one mould: what was expected, what came, where, what to do next."""

__all__ = [
    "CutError", "DataError", "FileFormatError", "HeadError", "OfframpError", "PlanError", "WidthError",
]


class OfframpError(ValueError):
    """A user's input that offramp cannot work with; the parent of every error that it raises on purpose.

    >>> raise OfframpError(expected="a batch of images (N, C, H, W)", got="shape (3, 32)", where="record()",
    ...                    todo="add a batch dimension: x[None]")
    Traceback (most recent call last):
        ...
    offramp.errors.OfframpError: record(): expected a batch of images (N, C, H, W), but got shape (3, 32). \
What to do: add a batch dimension: x[None]
    """

    def __init__(
        self, message: str = "", *, expected: str = "", got: str = "", where: str = "", todo: str = ""
    ) -> None:
        if expected:
            message = f"{where + ': ' if where else ''}expected {expected}, but got {got}."
            if todo:
                message += f" What to do: {todo}"
        super().__init__(message)
        self.expected, self.got, self.where, self.todo = expected, got, where, todo


class CutError(OfframpError):
    """A network that cannot be traced or cut at the asked place; names the op, the file and the line."""


class HeadError(OfframpError):
    """A head that does not fit its site, or that costs more than what it could save."""


class DataError(OfframpError):
    """Data that is missing, empty, unreadable, unpaired or not a number."""


class FileFormatError(OfframpError):
    """A file of offramp's own that is damaged, from a future version, or of another network."""


class PlanError(OfframpError):
    """A plan that no exits and thresholds can satisfy, or that does not belong to this network."""


class WidthError(OfframpError):
    """A network that cannot be narrowed as asked; names the op whose channels nobody can follow, the file and line."""
