"""How a forecast is told to people."""

from collections.abc import Mapping

UNITS = {
    "num_rows": "rows",
    "num_completion_tokens": "tokens",
    "seconds": "seconds",
    "gpu_hours": "GPU-hours",
    "engine_hours": "engine-hours",
}


def amount(name: str, value: float) -> str:
    """A number of a forecast: whole, but for hours, of which a small run takes few."""
    if not name.endswith("hours"):
        return f"{value:,.0f}"
    return f"{value:.2g}" if value < 1 else f"{value:,.2f}"


def describe_forecast(made: Mapping[str, Mapping[str, float] | None]) -> str:
    """A forecast in a line; ranges hold 80 % of outcomes."""
    parts = []
    for name, values in made.items():
        if values is None:
            continue
        middle, low, high = (amount(name, values[key]) for key in ("expected", "low", "high"))
        parts.append(f"{middle} {UNITS[name]} ({low} to {high})")
    return f"forecast: {', '.join(parts)}; 80 % ranges"
