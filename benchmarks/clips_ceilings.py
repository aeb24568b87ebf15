"""The best possible figures on the built-in clips from any of their modalities, by enumeration of all 27 posts.

    python -m benchmarks.clips_ceilings

Accuracy is that of the seven bins, by the most frequent value; MAE that of the median; correlation that of the mean.
"""

import itertools
from collections import Counter, defaultdict

import numpy as np

from distill.data.clips_corpus import LEVELS, value


def ceilings() -> dict[tuple[str, ...], dict[str, float]]:
    """Accuracy, MAE and correlation by the attributes that a predictor is given."""
    posts = [dict(zip(LEVELS, cell, strict=True)) for cell in itertools.product(*LEVELS.values())]
    return {
        shown: _best(posts, shown)
        for count in range(len(LEVELS) + 1)
        for shown in itertools.combinations(LEVELS, count)
    }


def _best(posts: list[dict[str, str]], shown: tuple[str, ...]) -> dict[str, float]:
    alike = defaultdict(list)
    for post in posts:
        alike[tuple(post[name] for name in shown)].append(value(post))
    found = list(alike.values())
    gold = np.concatenate(found)
    mean = np.concatenate([np.full(len(values), np.mean(values)) for values in found])
    return {
        "accuracy": sum(Counter(values).most_common(1)[0][1] for values in found) / len(posts),
        "mae": sum(float(np.abs(values - np.median(values)).sum()) for values in found) / len(posts),
        "correlation": float(np.corrcoef(gold, mean)[0, 1]) if np.ptp(mean) else 0.0,
    }


def main() -> None:
    """Print the table of docs/clips.md."""
    print("| given | accuracy | MAE | correlation |\n| --- | --- | --- | --- |")
    for shown, best in ceilings().items():
        print(f"| {', '.join(shown) or 'nothing'} | {' | '.join(f'{figure:.3f}' for figure in best.values())} |")


if __name__ == "__main__":
    main()
