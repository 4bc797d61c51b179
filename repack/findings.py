"""What a verification finds: damage with its place, notes, and how far each encoding is from the source."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_DAMAGE = 20  # lines that are kept; all are counted


@dataclass(frozen=True)
class Damage:
    """What is wrong, and where as far as it can be known."""

    file: str
    message: str
    layer: int | None = None
    expert: int | None = None
    part: str | None = None
    tensor: str | None = None
    row: int | None = None
    array: str | None = None

    def __str__(self) -> str:
        places = [
            f"{key} {value}"
            for key in ("layer", "expert", "part", "tensor", "row", "array")
            if (value := getattr(self, key)) is not None
        ]
        return f"{self.file}: {', '.join(places)}{': ' if places else ''}{self.message}"


@dataclass(frozen=True)
class Comparison:
    """All matrices of one encoding, in the source and here, against the source."""

    source: str
    encoding: str
    tensors: int
    weights: int
    max_abs_error: float | None  # None is for what is not finite, as damage can be
    relative_rms_error: float | None  # root of the mean squared error over that of the mean square of the source
    exact: bool


@dataclass(frozen=True)
class Verification:
    """The result: a container is sound when there is no damage."""

    files: int
    total_bytes: int  # of data files
    num_damage: int
    damage: tuple[Damage, ...]  # the first MAX_DAMAGE
    notes: tuple[str, ...]
    comparisons: tuple[Comparison, ...]  # none without a source

    @property
    def sound(self) -> bool:
        return self.num_damage == 0


class Findings:
    """Collects damage, up to a bound."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._damage: list[Damage] = []
        self.count = 0

    def add(self, damage: Damage) -> None:
        self.count += 1
        if len(self._damage) < MAX_DAMAGE:
            self._damage.append(damage)

    def add_error(self, file: str, error: Exception) -> None:
        """Damage that another module has put into words."""
        if isinstance(error, OSError):
            self.add(Damage(file, f"cannot be read: {error.strerror}"))
        else:
            message = str(error).removeprefix(f"{self._folder / file}: ").removeprefix(f"{file}: ")
            self.add(Damage(file, message))

    def result(
        self, files: int, total_bytes: int, notes: Sequence[str], comparisons: Sequence[Comparison]
    ) -> Verification:
        return Verification(files, total_bytes, self.count, tuple(self._damage), tuple(notes), tuple(comparisons))
