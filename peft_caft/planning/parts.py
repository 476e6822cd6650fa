"""Parts of a cost and their sum."""


class Parts:
    """Base of a dataclass whose fields add up."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())
