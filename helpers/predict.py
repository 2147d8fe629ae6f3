"""Predict before you run: a guess is kept, and shown beside what came out.

guess = predict(raw_pixels=0.6, features=0.8)
...
guess.beside({"raw_pixels": [0.84, 0.85], "features": [0.93, 0.94]})
"""

import statistics
from collections.abc import Mapping, Sequence

from helpers import expect


class Prediction:
    """Numbers guessed before a measurement; None where none was guessed."""

    def __init__(self, guesses: dict[str, float | None]) -> None:
        self.guesses = guesses

    def beside(self, results: Mapping[str, float | Sequence[float]]) -> None:
        """Print each result, as mean and standard deviation if it is several numbers, beside its guess.

        Raises:
            ValueError: a guess has no result of that name.
        """
        if missing := set(self.guesses) - set(results):
            raise ValueError(f"results must have {sorted(missing)}, got {sorted(results)}. Use the names of the prediction.")
        width = max(map(len, results))
        print(f"{'':<{width}}  measured        predicted")
        for name, values in results.items():
            values = [values] if isinstance(values, int | float) else list(values)
            mean = statistics.mean(values)
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else " " * 8
            guess = self.guesses.get(name)
            comparison = "-" if guess is None else f"{guess:.3f}  off by {abs(guess - mean):.3f}"
            print(f"{name:<{width}}  {mean:.3f}{spread}   {comparison}")


def predict(**guesses: float | None) -> Prediction:
    """Keep guesses for later; None, or `...`, where you have none.

    Raises:
        ValueError: a guess is neither a number nor None.
    """
    kept = {}
    for name, guess in guesses.items():
        if guess is not None and guess is not ... and (isinstance(guess, bool) or not isinstance(guess, int | float)):
            raise ValueError(f"{name} must be a number such as 0.7, or None, got {expect.describe(guess)}.")
        kept[name] = None if guess is ... else guess
    open_ones = [name for name, guess in kept.items() if guess is None]
    if open_ones:
        print(f"no prediction yet of: {', '.join(open_ones)}. A guess that is wrong teaches more than none.")
    else:
        print("kept: " + ", ".join(f"{name} {guess:g}" for name, guess in kept.items()))
    return Prediction(kept)
