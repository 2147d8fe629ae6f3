"""Whether a solution that passed works on a GPU too: what a check adds below its verdict, and what costs no points.

On a machine with a GPU the learner's code runs there. Without one it runs with tensors that only say they are on one
(`grader.fake_gpu`), which finds most of what a GPU would refuse. Grading must not depend on the grader's machine, so
nothing of this changes points or outcome, and nothing of it is looked at while grading.
"""

from grader.experiment import Exercise, Experiment, Subject, equal
from grader.observe import observe
from grader.setting import FAKE_GPU, GPU, Setting
from grader.verdict import Table


def try_on_gpu(exercise: Exercise, thing: Subject, table: Table, seed: int) -> list[tuple[str, str]]:
    """What is to be said of a solution that passed on the CPU, as (label, sentence).

    One experiment is run, the exercise's last of those that a fake GPU can run: it finds each of the right solutions
    that are known to work on the CPU only, and takes a fraction of the time of all. In autocast it is run if the
    exercise's statement asks for it, on the GPU if there is one, else on the CPU.
    """
    gpu = GPU if GPU.there else FAKE_GPU
    tried = [experiment for experiment in exercise.experiments if experiment.on_fake_gpu] or exercise.experiments
    last = tried[-1]
    if gpu == FAKE_GPU and not last.on_fake_gpu:
        return []
    problem, lines = _problem(exercise, last, thing, table, seed, gpu), []
    if problem:
        lines.append(("on a GPU", f"it works on the CPU only: {problem}. It costs no points."))
    elif problem == "" and gpu == GPU:
        lines.append(("on a GPU", "it works there too."))
    if exercise.autocast:
        half = Setting("cuda" if gpu == GPU else "cpu", "bfloat16")
        rounded = _problem(exercise, last, thing, table, seed, half)
        if rounded and rounded != problem:
            lines.append(("autocast", f"{rounded}. It costs no points."))
    return lines


def _problem(
    exercise: Exercise, experiment: Experiment, thing: Subject, table: Table, seed: int, setting: Setting
) -> str | None:
    """What is wrong with the subject in that setting: "" if nothing, None if with the reference too, so with the machine."""
    problem = _difference(exercise, experiment, thing, table, seed, setting)
    if problem and _difference(exercise, experiment, exercise.reference, table, seed, setting):
        return None
    return problem


def _difference(exercise: Exercise, experiment: Experiment, subject: Subject, table: Table, seed: int, setting: Setting) -> str:
    """What differs there from float32 on the CPU. Of the fake GPU only what a real one would refuse counts."""
    observation = observe(experiment, subject, seed, exercise.number, setting)
    if observation.problem is not None:
        counts = setting != FAKE_GPU or observation.problem.kind == "refused"
        return observation.problem.message.rstrip(".") if counts else ""
    if setting == FAKE_GPU:
        return ""
    expected = table[experiment.key]["reference"]
    differs = (fact for fact in expected if not equal(expected[fact], observation.facts.get(fact)))
    return next((f"{fact}: {observation.facts.get(fact)}. In float32 on the CPU: {expected[fact]}" for fact in differs), "")
