"""Exercise 2.8a: batches of texts of like length, and the way back to the order of the texts."""

import math
import operator
from collections.abc import Iterable
from itertools import chain, pairwise

import torch
from torch import Tensor

from grader.experiment import Exercise, Experiment, Fact, Subject, Trial, WrongReturn, wrong_return
from helpers.text import batches_by_length

exercise = Exercise(__name__, "2.8a", batches_by_length, core=4)

SIZES = (
    (11, 4),
    (12, 4),
    (14, 5),
    (1, 1),
    (1, 8),
    (5, 1),
    (6, 3),
    (7, 7),
    (3, 9),
    (2, 1),
    (13, 6),
    (230, 4),
)  # texts, batch_size


def _result(subject: Subject, lengths: Tensor, batch_size: int) -> dict[str, list]:
    value = subject(lengths, batch_size)
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise wrong_return("batches_by_length must return two things, batches and back", value)
    batches, back = value
    if isinstance(batches, str | dict | Tensor) or not isinstance(batches, Iterable):
        raise wrong_return("batches must be a list of tensors of indices", batches)
    return {
        "batches": [_numbers(part, "each of the batches must hold indices") for part in batches],
        "back": _numbers(back, "back must hold indices"),
    }


def _numbers(value: object, wanted: str) -> list[int]:
    """Whole numbers of one dimension, out of a tensor, an array or a list."""
    if not isinstance(value, Iterable) or isinstance(value, str | dict) or (isinstance(value, Tensor) and value.ndim != 1):
        raise wrong_return(wanted, value)
    try:
        return list(map(operator.index, value))
    except TypeError:
        raise WrongReturn(f"{wanted}, one after the other, as whole numbers: a tensor of int64, for example.") from None


class _Batches(Experiment):
    """Draws lengths of texts at random, many of them larger than any index; all but the first time some are equal."""

    question: str  # the name of the fact
    right: str  # its value for a right solution

    def draw(self, trial: Trial) -> dict:
        lengths = []
        for n, _ in SIZES:
            rising = 95 + torch.arange(n)
            equal = rising - (torch.arange(n) % 5 == 4).long() if lengths else rising
            lengths.append(equal[trial.permutation(n)])
        return {"lengths": lengths}

    def measure(self, subject, inputs):
        sizes = [batch_size for _, batch_size in SIZES]
        return {"results": [_result(subject, *given) for given in zip(inputs["lengths"], sizes, strict=True)]}

    def facts(self, raw, inputs):
        """Of all sizes the first fact that is not the right one."""
        sizes = [batch_size for _, batch_size in SIZES]
        answers = [
            self.fact(result["batches"], result["back"], lengths.tolist(), batch_size)
            for result, lengths, batch_size in zip(raw["results"], inputs["lengths"], sizes, strict=True)
        ]
        return {self.question: next((answer for answer in answers if answer != self.right), self.right)}

    def fact(self, batches: list[list[int]], back: list[int], lengths: list[int], batch_size: int) -> Fact:
        raise NotImplementedError


@exercise.experiment("each index once", 1)
class EachIndexOnce(_Batches):
    question, right = "the batches hold", "each index once"

    def fact(self, batches, back, lengths, batch_size):
        together = list(chain.from_iterable(batches))
        if sorted(together) == list(range(len(lengths))):
            return self.right
        if not set(together) <= set(range(len(lengths))):
            return "numbers that are no index"
        if len(together) > len(set(together)):
            return "some index more than once"
        held = [lengths[i] for i in together]
        missing = [lengths[i] for i in range(len(lengths)) if i not in together]
        if set(missing) <= set(held):
            return "of equal lengths not every index"
        return "all but the longest" if not held or max(held) <= min(missing) else "not every index"


@exercise.experiment("at most batch_size", 2)
class AtMostBatchSize(_Batches):
    question, right = "the indices are cut into", "batches of at most batch_size, as few as that allows"

    def fact(self, batches, back, lengths, batch_size):
        most, indices = max(map(len, batches), default=0), sum(map(len, batches))
        if most <= batch_size and len(batches) == math.ceil(indices / batch_size):
            return self.right
        if not all(batches):
            return "an empty batch, too"
        if len(batches) == batch_size:
            return "batch_size batches"
        return "batches larger than batch_size" if most > batch_size else "more batches than that needs"


@exercise.experiment("neighbours in length", 3)
class NeighboursInLength(_Batches):
    question, right = "a batch holds", "texts that follow one another when sorted by length"

    def fact(self, batches, back, lengths, batch_size):
        together = list(chain.from_iterable(batches))
        if not set(together) <= set(range(len(lengths))):
            return None  # of which texts it should be said, another experiment asks
        spans = sorted((min(of), max(of)) for of in ([lengths[i] for i in part] for part in batches) if of)
        if all(longest <= shortest for (_, longest), (shortest, _) in pairwise(spans)):
            return self.right
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        known = {
            "texts in the order in which they came": list(range(len(lengths))),
            "texts that follow one another as they came, sorted": self.sorted_alone(lengths, batch_size),
            "the places of texts among the sorted ones, taken for their indices": _inverse(order),
        }
        return next((name for name, indices in known.items() if together == indices), "other texts")

    def sorted_alone(self, lengths: list[int], batch_size: int) -> list[int]:
        parts = [range(start, len(lengths))[:batch_size] for start in range(0, len(lengths), batch_size)]
        return list(chain.from_iterable(sorted(part, key=lengths.__getitem__) for part in parts))


@exercise.experiment("back in place", 4)
class BackInPlace(_Batches):
    question, right = "the rows, put back, stand", "in the order of the texts"

    def fact(self, batches, back, lengths, batch_size):
        together, n = list(chain.from_iterable(batches)), len(lengths)
        if set(back) <= set(range(len(together))) and [together[place] for place in back] == list(range(n)):
            return self.right
        if sorted(together) != list(range(n)):
            return None  # they cannot: some row is missing
        if back == list(range(n)):
            return "as they came out of the batches"
        return "where the order itself sends them" if back == together else "elsewhere"


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def solution(lengths, batch_size, *, order=Tensor.argsort, cut=Tensor.split, back=torch.argsort):
    """A right solution: the order of the texts, the batches made of it, the way back."""
    indices = order(lengths)
    return list(cut(indices, batch_size)), back(indices)


def _whole_batches(indices: Tensor, batch_size: int) -> list[Tensor]:
    return [part for part in indices.split(batch_size) if len(part) == batch_size]


exercise.misconceptions_of(
    solution,
    {
        "order not put back": {"back": lambda order: torch.arange(len(order))},
        "put back with the wrong permutation": {"back": lambda order: order},
        "batches in the order of the texts": {"order": lambda lengths: torch.arange(len(lengths))},
        "ranks in place of indices": {"order": lambda lengths: lengths.argsort().argsort()},
        "lengths in place of indices": {"order": lambda lengths: lengths.sort().values},
        "batch_size as a number of batches": {"cut": Tensor.chunk},
        "last batch dropped": {"cut": _whole_batches},
    },
)


@exercise.misconception("one text of each length")
def one_text_of_each_length(lengths, batch_size):
    text_of = {length: text for text, length in enumerate(lengths.tolist())}
    order = torch.tensor([text_of[length] for length in sorted(text_of)])
    return list(order.split(batch_size)), order.argsort()


@exercise.misconception("sorted within each batch")
def sorted_within_each_batch(lengths, batch_size):
    batches = [part[lengths[part].argsort()] for part in torch.arange(len(lengths)).split(batch_size)]
    return batches, torch.cat(batches).argsort()
