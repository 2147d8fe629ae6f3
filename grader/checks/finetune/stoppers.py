"""What the check of exercise 4.5 talks to stoppers with: scores, states of a model, and when they say stop."""

import math

import torch
from torch import Tensor, nn

from grader.checks import traces
from grader.experiment import Trial, WrongReturn, wrong_return
from grader.near import near
from helpers import expect

OTHER = "different"
NAN = None  # how a draw spells it: a NaN in the inputs would not equal itself when they are compared afterwards

State = dict[str, dict[str, Tensor]]  # {"parameters": by name, "buffers": by name}, as a snapshot of traces has them


def draw_scores(trial: Trial, ranks: list[int], above: float = 0.0) -> list[float]:
    """Numbers between `above` and `above` + 1 in the order of the ranks; equal ranks give equal numbers."""
    distinct = sorted(set(ranks))
    gaps = 0.5 + torch.rand(len(distinct), generator=trial.generator, dtype=torch.float64)
    values = above + gaps.cumsum(0) / (gaps.sum() + 1)
    return [values[distinct.index(rank)].item() for rank in ranks]


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def draw_states(trial: Trial, count: int) -> list[State]:
    """That many states of a `small_model`, no number of which occurs twice."""
    model = traces.of(small_model())
    return [
        {
            kind: {
                name: trial.normal(*tensor.shape) if tensor.is_floating_point() else torch.tensor(10 + number)
                for name, tensor in model[kind].items()
            }
            for kind in ("parameters", "buffers")
        }
        for number in range(count)
    ]


def whose(kind: str, state: State, known: dict[str, State]) -> str:
    """The first of the known states that has the parameters, or the buffers, of this one."""
    for name, candidate in known.items():
        if all(key in state[kind] and near(state[kind][key], value) for key, value in candidate[kind].items()):
            return f"those of {name}"
    return OTHER


def make_stopper(subject, model: nn.Module, patience: int):
    stopper = subject(model, patience)
    missing = [name for name in ("step", "restore") if not callable(getattr(stopper, name, None))]
    if missing:
        raise WrongReturn(
            f"EarlyStopping must have methods step and restore, got {expect.describe(stopper)} without {' and '.join(missing)}."
        )
    return stopper


def tell(stopper, score: float | None) -> bool:
    """Tell it a score; whether it says stop."""
    stop = stopper.step(math.nan if score is NAN else score)
    if stop is None:
        raise wrong_return("step must return True or False", stop)
    return bool(stop)


def stops_after(subject, patience: int, scores: list[float | None]) -> int | None:
    """The position of the score after which it says stop."""
    stopper = make_stopper(subject, small_model(), patience)
    return next((position for position, score in enumerate(scores) if tell(stopper, score)), None)


def waited(stop: int | None, best: int, patience: int) -> str:
    """How many scores after the last best it stops, in words that hold for every patience."""
    if stop is None:
        return "never"
    if stop < best:
        return "before the best score has come"
    extra = stop - best - patience
    return "patience scores after the best" + (f" {'plus' if extra > 0 else 'minus'} {abs(extra)}" if extra else "")


def moment(stop: int | None, usual: int | None, best: int, control: str, sooner: int = 0) -> str | None:
    """When it stops, beside when it does with ordinary scores, the control; None if it does not even stop there.

    Args:
        stop, usual: the positions of the scores after which it stops, with the scores in question and with the control.
        best: the position of the best score of the control.
        control: what those scores are called.
        sooner: how many scores before `usual` it should stop.
    """
    if usual is None or usual <= best:
        return None
    if stop is None:
        return "never"
    later = stop - usual + sooner
    if later == 0:
        return f"as it does with {control}"
    return f"{'one score ' * (abs(later) == 1)}{'later' if later > 0 else 'earlier'} than with {control}"
