"""Text of the plan: columns, and numbers with a prefix."""

import math
from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Format rows as columns; the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{c:<{w}}" if n < left else f"{c:>{w}}" for n, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def si_prefix(value: float) -> str:
    """Format a number with three significant digits and an SI prefix."""
    value = float(f"{value:.3g}")  # rounded first, so that 999,600 becomes 1 M and not 1000 k
    power = min(int(math.log10(value)) // 3, 6) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {'kMGTPE'[power - 1] if power else ''}".rstrip()
