"""How fast a counter goes, from a dozen points of the last minute."""

from dataclasses import dataclass, field

_WINDOW_S = 60.0
_POINT_EVERY_S = 5.0


@dataclass
class Rate:
    """A counter over the last minute, and since it first moved."""

    points: list[list[float]] = field(default_factory=list)
    began: float | None = None

    def begin(self, t: float) -> None:
        """The counter stands at 0, and is about to move: what waits for a worker has no rate yet."""
        if self.began is None:
            self.began = t
            self.points.append([t, 0.0])

    def is_due(self, t: float) -> bool:
        """Whether `point` would keep where the counter stands."""
        return self.began is not None and t - self.points[-1][0] >= _POINT_EVERY_S

    def point(self, t: float, value: float) -> None:
        """Where the counter stands; kept every five seconds."""
        if not self.is_due(t):
            return
        self.points.append([t, value])
        while self.points[1][0] <= t - _WINDOW_S:
            self.points.pop(0)

    def last_minute(self, t: float, value: float) -> float | None:
        """Units a second over the last minute; None before the first second is over."""
        if self.began is None or t - self.points[0][0] < 1:
            return None
        return max(value - self.points[0][1], 0.0) / (t - self.points[0][0])

    def overall(self, t: float, value: float) -> float | None:
        """Units a second since the counter first moved."""
        return None if self.began is None or t - self.began < 1 else value / (t - self.began)
