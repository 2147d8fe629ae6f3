"""Record the right solutions on this machine, or compare this machine with the records.

    python -m grader.golden tables      the truth tables, of one topic or of all: what `make course` does too
    python -m grader.golden record      on every device and in every precision there is; then deviations anew
    python -m grader.golden verify      a table of where this machine deviates, and of facts that change with it

On a machine with a GPU, both take the GPU too.
"""

import json
import sys
from typing import Annotated

import typer

from grader import golden
from grader.checks import TOPICS, exercises
from grader.golden import AWAITS, FOLDER
from grader.golden.deviations import Deviation, between
from grader.golden.records import SETTINGS, Record, all_versions, each, measure, mistakes, path_of, read, versions, write
from grader.golden.truth import write_tables
from grader.observe import differing_facts
from grader.setting import CPU, Setting
from helpers.files import write_text

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Topics = Annotated[list[str] | None, typer.Argument(help="Topics, such as lora; all if left out.")]


@app.command()
def tables(topics: Topics = None) -> None:
    """Write the truth tables, the facts of every reference and every misconception, and print what changed."""
    print("\n".join(write_tables(_known(topics))) or "no fact has changed")


@app.command()
def record(topics: Topics = None) -> None:
    """Run every right solution here and write records and deviations."""
    for topic in _known(topics):
        for setting in SETTINGS:
            if setting.there and (made := measure(topic, setting)).results:
                for number, name, subject, _, raw in each(made.results):
                    if subject == "reference" and "problem" in raw:
                        print(
                            f"not recorded: {number}, {name}, {setting}: the reference fails: {raw['problem']}", file=sys.stderr
                        )
                        raise typer.Exit(1)
                write(made, path_of(topic, setting))
                print(f"{topic}, {setting}: recorded", flush=True)
    write_text(FOLDER / "deviations.json", json.dumps(deviations(), indent=1, ensure_ascii=False) + "\n")


@app.command()
def verify(topics: Topics = None) -> None:
    """Compare this machine with the records: the results of every right solution, and its facts and those of every mistake.

    Facts are made at the tolerance and at its margins, as the proofs make them.
    """
    wrong = 0
    print(f"{'exercise':9} {'experiment':34} {'setting':16} {'beside':14} {'deviation':>10}  facts")
    for topic in _known(topics):
        for setting in SETTINGS:
            if setting.precision == "bfloat16" and not any(e.autocast for e in exercises(topic).values()):
                continue
            kept = _kept(topic, setting)
            if not setting.there or kept is None:
                print(f"{topic:44} {setting!s:16} {AWAITS}")
                continue
            here, version = measure(topic, setting), kept[0]
            facts = facts_that_differ(topic, here, setting)
            if setting == CPU:
                facts = _together(facts, facts_that_differ(topic, measure(topic, setting, mistakes, seeds=(0,)), setting))
            far = between(here.results, kept[1].results)
            for number, experiment in dict.fromkeys((*far, *facts)):  # where all solutions fail, nothing is compared
                deviation = far.get((number, experiment), Deviation(0.0))
                differ = facts.get((number, experiment), [])
                wrong += len(differ)
                if deviation.far or deviation.unlike or differ:
                    print(_row(number, experiment, setting, version, deviation, differ), flush=True)
            print(f"{topic:44} {setting!s:16} {len(far)} experiments compared", flush=True)
    print("every fact is as recorded" if not wrong else f"{wrong} facts differ")
    raise typer.Exit(bool(wrong))


def deviations() -> dict:
    """What the records say of devices and precisions (the same versions) and of versions (the same device), apart.

    {"devices": {"torch-2.14.0, cuda float32 beside cpu float32": {"6.1": {"the update": 1e-7}}}, "versions": {...}, ...}
    """
    names = all_versions()
    beside: dict[str, dict] = {"cuda": {}, "cpu": {}}
    for version in names:
        for setting in SETTINGS:
            if setting != CPU and (compared := _compared((version, setting), (version, CPU))):
                beside[setting.device][f"{version}, {setting} beside {CPU}"] = compared
    versions_apart = {
        f"{version} beside {names[-1]}, {setting}": compared
        for version in names[:-1]
        for setting in SETTINGS
        if (compared := _compared((version, setting), (names[-1], setting)))
    }
    return {"devices": beside["cuda"] or AWAITS, "precisions": beside["cpu"], "versions": versions_apart}


def facts_that_differ(topic: str, here: Record, setting: Setting) -> dict[tuple[str, str], list[str]]:
    """(number, experiment) -> the facts that are not those of the truth table, at the tolerance or at its margins."""
    differing: dict[tuple[str, str], list[str]] = {}
    experiments = {n: {x.key: x for x in exercise.experiments} for n, exercise in exercises(topic).items()}
    for number, name, subject, seed, raw in each(here.results):
        table = golden.load(topic)[number][name]
        expected = table.get(subject, table["reference"])  # right solutions have the reference's
        if "problem" in raw:
            if expected is not None and (setting.device == "cpu" or subject == "reference"):
                differing.setdefault((number, name), []).append(f"{subject}: {raw['problem']}")
            continue
        if expected is None:
            differing.setdefault((number, name), []).append(f"{subject}: it raises in the truth table, and not here")
            continue
        if differ := differing_facts(experiments[number][name], raw, seed, expected, setting):
            differing.setdefault((number, name), []).extend(f"{subject}: {fact}" for fact in differ)
    return differing


def _together(*parts: dict[tuple[str, str], list[str]]) -> dict[tuple[str, str], list[str]]:
    keys = dict.fromkeys(key for lines in parts for key in lines)
    return {key: [line for lines in parts for line in lines.get(key, ())] for key in keys}


def _compared(ours: tuple[str, Setting], theirs: tuple[str, Setting]) -> dict[str, dict[str, float | str]]:
    deviations: dict[str, dict[str, float | str]] = {}
    for topic in TOPICS.values():
        paths = [path_of(topic, setting, version) for version, setting in (ours, theirs)]
        if all(path.exists() for path in paths):
            for (number, name), deviation in between(*(read(path).results for path in paths)).items():
                deviations.setdefault(number, {})[name] = deviation.unlike or float(f"{deviation.far:.1e}")
    return deviations


def _kept(topic: str, setting: Setting) -> tuple[str, Record] | None:
    """The record of these versions or, if there is none, of the newest; with the name of its versions."""
    for version in (versions(), *reversed(all_versions())):
        if (path := path_of(topic, setting, version)).exists():
            return version, read(path)
    return None


def _row(number: str, name: str, setting: Setting, version: str, deviation: Deviation, differ: list[str]) -> str:
    far = f"{deviation.far:.1e}" if deviation.unlike is None else "another"
    facts = "; ".join(differ) if differ else "the same"
    unlike = f" ({deviation.unlike})" if deviation.unlike else ""
    return f"{number:9} {name:34} {setting!s:16} {version:14} {far:>10}  {facts}{unlike}"


def _known(topics: list[str] | None) -> list[str]:
    if unknown := set(topics or ()) - set(TOPICS.values()):
        raise typer.BadParameter(f"no topic {sorted(unknown)[0]!r}. Choose from {', '.join(TOPICS.values())}.")
    return topics or list(TOPICS.values())


if __name__ == "__main__":
    sys.exit(app())
