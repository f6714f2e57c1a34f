"""A forecast as a few lines for a person."""

from __future__ import annotations

from collections.abc import Sequence

from phlora.forecast.forecast import Forecast, Seconds, gigabytes
from phlora.forecast.remedies import Remedy

# Smaller parts are counted together.
_LEAST_SHARE = 0.01
# A step whose time is known to within this share of it is given as one figure.
_SURE = 0.1


def render(forecast: Forecast) -> str:
    """Memory by part and device, activation memory with its reason, seconds."""
    memory = forecast.memory
    lines = [f"  computed in {memory.computed}, frozen weights stored in {memory.stored}"]
    for device, parts in memory.by_device().items():
        total = sum(parts.values())
        lines.append(f"  memory on {device}: {gigabytes(total)} at most = {_parts(parts, total)}")
    free = forecast.free
    if free.num_bytes is not None:
        verdict = "fits" if forecast.fits else "does NOT fit"
        lines.append(
            f"  {verdict}: {gigabytes(forecast.needed)} more than this process holds, "
            f"{gigabytes(free.num_bytes)} free ({free.limit})"
        )
    lines.append(f"  activation_memory {forecast.level}: {forecast.reason}")
    seconds = forecast.seconds
    if seconds is not None:
        lines.append(
            f"  time: {_time(seconds.step)} a step{_range(seconds)}, {_time(seconds.training)} of training, "
            f"up to {_time(seconds.evaluation)} of evaluation (measured on layers of these shapes)"
        )
    return "\n".join(lines)


def render_remedies(found: Sequence[Remedy]) -> str:
    """What makes it fit, one change a line."""
    if not found:
        return "No single change makes it fit"
    return "\n".join(f"  {_line(each)}" for each in found)


def _line(remedy: Remedy) -> str:
    words = [gigabytes(remedy.forecast.needed)]
    if remedy.slower is not None:
        words.append(f"{remedy.slower:.2f} times the time of a step")
    if remedy.note:
        words.append(remedy.note)
    return f"--set {remedy.describe().replace(' ', ' --set ')}  ({'; '.join(words)})"


def _parts(parts: dict[str, int], total: int) -> str:
    shown = {name: size for name, size in parts.items() if size >= _LEAST_SHARE * total}
    rest = total - sum(shown.values())
    words = [f"{name} {gigabytes(size)}" for name, size in shown.items()]
    return " + ".join([*words, f"the rest {gigabytes(rest)}"] if rest else words)


def _range(seconds: Seconds) -> str:
    """Where it says more than the figure itself."""
    least, most = seconds.step_range
    unsure = max(seconds.step - least, most - seconds.step) > _SURE * seconds.step
    return f" ({_time(least)} to {_time(most)}: the rounds that measured it differ)" if unsure else ""


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
