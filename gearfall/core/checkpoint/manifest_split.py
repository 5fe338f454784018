"""How tensor-parallel ranks share a tensor along one dimension. Pure arithmetic.

A dimension is a row of sections (a fused QKV projection has three), each of `length` elements in
`units` equal units that stay together as long as there are no more ranks than units:

    ranks <= units   rank r of R takes units floor(r n / R) up to floor((r + 1) n / R)
    ranks >  units   rank r serves unit u = floor(r n / R), together with the ranks from
                     ceil(u R / n) up to ceil((u + 1) R / n). With `members` m > 0 the j-th of
                     these k ranks takes members floor(j m / k) up to floor((j + 1) m / k) of the
                     unit; with m = 0 each takes the whole unit.

Query heads are units of the heads that share a KV head, with those heads as members; KV heads are
units without members. So a rank always holds the KV heads that its query heads ask for.
"""

from dataclasses import dataclass

from gearfall.core.errors import InvalidRequest

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) along a dimension, in the order in which the elements lie."""


@dataclass(frozen=True, slots=True)
class Section:
    """A stretch of a dimension that is shared on its own."""

    length: int
    """Elements."""
    units: int
    members: int
    """Parts that a unit may be cut into; 0: never cut, but given to several ranks."""

    def range_of(self, rank: int, ranks: int) -> tuple[int, int]:
        """Return (start, stop) of a rank's elements. Raises InvalidRequest: too many ranks."""
        size = self.length // self.units
        if ranks <= self.units:
            return rank * self.units // ranks * size, (rank + 1) * self.units // ranks * size
        unit = rank * self.units // ranks
        if not self.members:
            return unit * size, (unit + 1) * size
        first = -(-unit * ranks // self.units)
        count = -(-(unit + 1) * ranks // self.units) - first
        if count > self.members:
            raise InvalidRequest(
                f"{ranks} ranks can't share {self.units * self.members} indivisible parts",
                param="ranks",
            )
        member_size = size // self.members
        start, stop = ((rank - first + i) * self.members // count * member_size for i in (0, 1))
        return unit * size + start, unit * size + stop


@dataclass(frozen=True, slots=True)
class Split:
    """The dimension along which a tensor is shared, and its sections."""

    dimension: int
    sections: tuple[Section, ...]

    @property
    def length(self) -> int:
        """Of the whole dimension."""
        return sum(section.length for section in self.sections)

    def ranges(self, rank: int, ranks: int) -> Ranges:
        """Elements of `rank`, section by section; none is empty, neighbours are joined.

        Raises InvalidRequest when there are more ranks than indivisible parts.
        """
        found: list[tuple[int, int]] = []
        begin = 0
        for section in self.sections:
            start, stop = (begin + place for place in section.range_of(rank, ranks))
            begin += section.length
            if found and found[-1][1] == start:
                start = found.pop()[0]
            if start < stop:
                found.append((start, stop))
        return tuple(found)

    def part_shape(self, full_shape: tuple[int, ...], rank: int, ranks: int) -> tuple[int, ...]:
        """Shape of one rank's part."""
        length = sum(stop - start for start, stop in self.ranges(rank, ranks))
        return _with_length(full_shape, self.dimension, length)

    def full_shape(self, part_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor that a part belongs to."""
        return _with_length(part_shape, self.dimension, self.length)


def _with_length(shape: tuple[int, ...], dimension: int, length: int) -> tuple[int, ...]:
    return (*shape[:dimension], length, *shape[dimension + 1 :])
