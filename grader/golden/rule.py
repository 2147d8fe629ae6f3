"""How near is near enough: the rule by which a fact gets its tolerance.

Facts are made from recorded results under tolerances from 1e-9 to 1, a factor of ten apart, and compared with the truth table:

    needs    the smallest tolerance at which every subject shows its facts: what rounding needs, on that device
    tells    the largest one: beyond it two subjects are taken for one another, or a mistake for what is right
    ten times `needs`, and at least ten times what float32 rounds, is the tolerance; ten times that must not exceed `tells`

So ten times less rounding or ten times more changes no verdict. Facts that hold under every tolerance are exact and have none.
"""

from collections.abc import Iterable, Mapping
from importlib import import_module

from grader.experiment import Exercise, Experiment, Fact, equal
from grader.golden import AWAITS, load
from grader.golden.records import SEEDS, SETTINGS, Raw, Record
from grader.observe import facts_under, run
from grader.setting import CPU, Setting

GRID = tuple(float(f"1e{power}") for power in range(-9, 1))
ROUNDING = 1e-7  # of float32, relative: 2^-23

Row = dict[str, float | str | None]  # "tells" and, for each setting, the tolerance; None where the rule cannot be kept
Recorded = Mapping[Setting, Iterable[Record]]  # the records there are of a topic, by setting


class Broken(Exception):
    """A fact for which no tolerance keeps the rule on the CPU: its experiment has to change."""


def tolerances(topic: str, exercise: Exercise, recorded: Recorded) -> dict[str, dict[str, Row]]:
    """Experiment -> fact -> its row.

    Raises:
        Broken: a fact has no tolerance on the CPU.
    """
    return {
        experiment.name: rows for experiment in exercise.experiments if (rows := _rows(topic, exercise, experiment, recorded))
    }


def _rows(topic: str, exercise: Exercise, experiment: Experiment, recorded: Recorded) -> dict[str, Row]:
    table = load(topic)[exercise.number][experiment.name]
    held = {setting: _held(experiment, exercise, table, records) for setting, records in recorded.items()}
    wrong = [
        held_under(experiment, raw, seed, table[name])
        for name, raw, seed in _wrong(topic, exercise, experiment)
        if table[name] is not None
    ]
    rows: dict[str, Row] = {}
    for fact in table["reference"]:
        everywhere = [_all(fact, held[CPU]), _all(fact, wrong)]
        both = [right and told for right, told in zip(*everywhere, strict=True)]
        if all(both) and all(all(_all(fact, of)) for of in held.values()):
            continue
        first, last = _longest(both)
        rows[fact] = {"tells": GRID[last]}
        for setting in SETTINGS:
            if setting.precision == "bfloat16" and not exercise.autocast:
                continue
            here = both if setting == CPU else _all(fact, held.get(setting, []))
            there = bool(held.get(setting))
            rows[fact][str(setting)] = _tolerance(here, last) if there else AWAITS
        if rows[fact][str(CPU)] is None:
            raise Broken(
                f"{exercise.number}, {experiment.name}, “{fact}”: holds from {GRID[first]:g} to {GRID[last]:g}, and needs a "
                "factor of ten on either side of its tolerance. Draw inputs further apart, or compare on another scale."
            )
    return rows


def held_under(experiment: Experiment, raw: Raw, seed: int, expected: Mapping[str, Fact]) -> dict[str, list[bool]]:
    """Fact -> whether it is as expected, for each tolerance of `GRID`.

    Facts that are the same under the smallest, a middle and the largest are not made under those between.
    """
    few = {place: facts_under(experiment, raw, seed, GRID[place])[0] for place in (0, len(GRID) // 2, len(GRID) - 1)}
    if all(facts == few[0] for facts in few.values()):
        made = [few[0]] * len(GRID)
    else:
        made = [few.get(place) or facts_under(experiment, raw, seed, GRID[place])[0] for place in range(len(GRID))]
    return {fact: [equal(value, facts.get(fact)) for facts in made] for fact, value in expected.items()}


def _held(experiment: Experiment, exercise: Exercise, table: dict, records: Iterable[Record]) -> list[dict[str, list[bool]]]:
    """For every right solution that ran: what held under which tolerance."""
    return [
        held_under(experiment, raw, seed, table["reference"])
        for record in records
        for seeds in record.results.get(exercise.number, {}).get(experiment.name, {}).values()
        for seed, raw in seeds.items()
        if "problem" not in raw
    ]


def _wrong(topic: str, exercise: Exercise, experiment: Experiment) -> Iterable[tuple[str, Raw, int]]:
    """Every misconception as it is declared and as it is written again, measured on the CPU."""
    again = import_module(f"grader.variants.{topic}").AGAIN[exercise.number]
    declared = {m.name: m.subject for m in exercise.misconceptions}
    for name, subject in [*declared.items(), *again.items()]:
        for seed in SEEDS:
            ran = run(experiment, subject, seed, exercise.number)
            if ran.problem is None:
                yield name, ran.raw, seed


def _all(fact: str, held: list[dict[str, list[bool]]]) -> list[bool]:
    return [all(of[fact][place] for of in held if fact in of) for place in range(len(GRID))]


def _longest(holds: list[bool]) -> tuple[int, int]:
    """First and last place of the longest run of True; of a list without one, (0, 0)."""
    best, start = (0, 0), None
    for place, held in enumerate([*holds, False]):
        if held and start is None:
            start = place
        if not held and start is not None:
            best, start = max(best, (start, place - 1), key=lambda run: run[1] - run[0]), None
    return best


def _tolerance(holds: list[bool], tells: int) -> float | None:
    """Ten times what is needed, if ten times that is still told."""
    if not holds[tells]:
        return None
    first = tells
    while first and holds[first - 1]:
        first -= 1
    first = max(first, GRID.index(ROUNDING))
    return GRID[first + 1] if first + 2 <= tells else None
