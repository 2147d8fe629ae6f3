"""Ways to spend the same labels and the same steps on a pre-trained network, and what each costs.

    head only            the backbone is frozen
    last k stages        the head and that many stages before it train; `last stage` is k = 1
    everything           all stages train, from a random head
    discriminative       the same, each stage with a learning rate 2.6 times lower than the next (ULMFiT)
    gradual unfreezing   the head first, then one stage more at equal intervals
    LP-FT                the head starts as the linear probe, then everything trains
    LoRA rank r          the head, and adapters of rank r: of MiniLM's queries and values, of every convolution of glyphnet
    head frozen, LoRA rank r    the same adapters, and a head that stays random: a mistake that nothing reports

Every strategy gets the same labelled examples, the same number of steps, and the best of three learning rates on the same
validation examples (of equals the lowest). What is measured of the chosen model:

    inside       accuracy on the task's test examples
    outside      accuracy in another domain with the same classes; for digits, printed ones
    source       accuracy on what the backbone was trained on (letters), with the head it had there: less is forgetting

Training takes long, so results are kept in `strategies.json`. `python -m helpers.recordings.strategies` measures what is
missing there, and adds it as a recording of its own, with its machine, versions and date; those before it stay as they are.

Sources: Howard & Ruder 2018 (ULMFiT); Kumar et al. 2022 (LP-FT); Hu et al. 2021 (LoRA).
"""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from helpers import lora
from helpers.backbones import TextBackbone, classifier, stages
from helpers.data import Examples, word_order
from helpers.environment import here_and_now, recorded_on
from helpers.files import write_text
from helpers.finetune import GradualUnfreezing, lp_ft, parameter_groups, train_last, unfreeze
from helpers.forgetting import letters_kept, printed
from helpers.recordings import transfer
from helpers.training import evaluate, fit

TASKS = transfer.TASKS | {"word order": transfer.TASKS["docstrings"]._replace(examples=word_order, classes=2, steps=100)}
DEPTHS = ("last 2 stages", "last 3 stages", "last 4 stages")
FIVE = ("head only", "last stage", "everything", "gradual unfreezing", "LP-FT")
LEARNING_RATES = {task: known.learning_rates for task, known in TASKS.items()}
HEAD_LEARNING_RATES = {"digits": (3e-3, 1e-2, 3e-2), "docstrings": (3e-3, 1e-2, 3e-2), "word order": (1e-2, 3e-2, 1e-1)}
LORA_LEARNING_RATES = (1e-3, 3e-3, 1e-2)
ALPHA = 16
RANKS = (1, 2, 8, 32)
DRAWS = {"digits": 5, "docstrings": 3, "word order": 3}
RECORDED = {  # task -> labels per class -> strategies
    "digits": {
        2: (*FIVE, "discriminative"),
        10: (*DEPTHS, *FIVE, "discriminative", "LoRA rank 4", "head frozen, LoRA rank 4"),
        50: (*FIVE, "discriminative"),
    },
    "docstrings": {
        10: ("head only", "last stage", "last 3 stages", "everything", "LoRA rank 8"),
    },
    "word order": {100: ("head only", "everything", *(f"LoRA rank {rank}" for rank in RANKS))},
}
CUTS = (0, 1, 2, 8, 32, 384)  # ranks that the updates of full fine-tuning on word order are cut to
RECORD = Path(__file__).with_suffix(".json")


class Scores(NamedTuple):
    """What one run left: accuracies from 0 to 1, None where there is nothing to measure it on."""

    lr: float
    validation: float
    inside: float
    outside: float | None
    source: float | None
    trainable: int  # parameters that trained at the end


class Update(NamedTuple):
    """What fine-tuning everything on word order added to each of MiniLM's 36 matrices, the embeddings aside, in one draw."""

    ranks: list[int]  # of each matrix: the rank that holds 90 % of the update's squares
    shares: list[float]  # of each matrix: the squares in the update's best approximation of rank 8, from 0 to 1
    accuracy: dict[int, float]  # one of `CUTS` -> on the test texts, with each update cut to that rank


def strategies(task: str) -> tuple[str, ...]:
    """The names of all strategies for a task: how many stages there are to unfreeze depends on its backbone."""
    depths = len(TASKS[_known(task)].backbone(True).stages)
    return ("head only", *(_last(k) for k in range(1, depths)), "everything", "discriminative", *FIVE[3:])


def train(strategy: str, model: nn.Sequential, examples: Examples, lr: float, steps: int, batch_size: int, seed: int) -> None:
    """Train `model`, as `classifier` makes it, in place."""
    names, settings = stages(model), {"steps": steps, "lr": lr, "batch_size": batch_size, "seed": seed, "progress": False}
    if strategy == "LP-FT":
        lp_ft(model, "head", examples, penalty=1e-2, **settings)
    elif strategy == "gradual unfreezing":
        schedule = GradualUnfreezing(model, lr, steps, factor=1, weight_decay=1e-4)
        fit(model, examples, groups=schedule.groups, before_step=schedule, **settings)
    elif strategy == "discriminative":
        unfreeze(model)
        fit(model, examples, groups=parameter_groups(model, lr, weight_decay=1e-4), **settings)
    elif "LoRA rank " in strategy:
        heads = [] if strategy.startswith("head frozen") else ["head"]
        lora.inject(model, adapted(model), int(strategy.rpartition(" ")[2]), ALPHA, train=heads)
        fit(model, examples, **settings)
    else:
        depths = {_last(k): k for k in range(1, len(names) - 1)} | {"head only": 0, "everything": len(names) - 1}
        if strategy not in depths:
            raise ValueError(f"strategy must be one of {', '.join(map(repr, [*depths, *FIVE[3:]]))}, got {strategy!r}.")
        train_last(model, 1 + depths[strategy])
        fit(model, examples, **settings)


def run(task: str, strategy: str, labels_per_class: int, draw: int, lr: float) -> Scores:
    """Train once with one learning rate, and measure.

    Args:
        task: "digits", "docstrings" or "word order".
        strategy: one of `strategies(task)`.
        labels_per_class: how many labelled examples of each class; `draw` says which, and seeds the head and training.
        lr: the highest learning rate of any stage.
    """
    known = TASKS[_known(task)]
    examples = known.examples("train", labels_per_class, draw)
    model = classifier(known.backbone(True), len(examples.classes), seed=draw)
    train(strategy, model, examples, lr, known.steps, known.batch_size, seed=draw)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    outside = source = None
    if task == "digits":
        outside, source = evaluate(model, printed()), letters_kept(model.backbone)
    scores = (evaluate(model, known.examples(split)) for split in ("validation", "test"))
    return Scores(lr, *scores, outside, source, trainable)


def measure(task: str, strategy: str, labels_per_class: int, draw: int) -> Scores:
    """`run` with each of three learning rates; the scores of the one that is best on validation."""
    rates = learning_rates(task, strategy)
    runs = [run(task, strategy, labels_per_class, draw, lr) for lr in rates]
    return max(runs, key=lambda scores: scores.validation)  # the first of equals: the lowest learning rate


def measure_update(draw: int, lr: float) -> Update:
    """Fine-tune everything on word order once; look at what was added, and at what is left of it at each of `CUTS`."""
    known = TASKS["word order"]
    examples, test = known.examples("train", 100, draw), known.examples("test")
    model = classifier(known.backbone(True), len(examples.classes), seed=draw)
    weights = {name: p for name, p in model.backbone.named_parameters() if p.ndim == 2 and "embeddings" not in name}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    train("everything", model, examples, lr, known.steps, known.batch_size, seed=draw)
    ranks = [lora.rank_of_update(before[name], weight, 0.9) for name, weight in weights.items()]
    parts = {name: torch.linalg.svd(weight.detach() - before[name], full_matrices=False) for name, weight in weights.items()}
    shares = [(s[:8].square().sum() / s.square().sum()).item() for _, s, _ in parts.values()]
    left = {}
    for rank in CUTS:
        with torch.no_grad():
            for name, (u, s, vt) in parts.items():
                weights[name].copy_(before[name] + (u[:, :rank] * s[:rank]) @ vt[:rank])
        left[rank] = evaluate(model, test)
    return Update(ranks, shares, left)


def learning_rates(task: str, strategy: str) -> tuple[float, float, float]:
    """The three learning rates that `measure` tries."""
    if "LoRA" in strategy:
        return LORA_LEARNING_RATES
    return (HEAD_LEARNING_RATES if strategy == "head only" else LEARNING_RATES)[_known(task)]


def adapted(model: nn.Sequential) -> list[str]:
    """The layers that LoRA adapts here, by name: queries and values of a text encoder, else every convolution."""
    kinds = (nn.Linear,) if isinstance(model.backbone, TextBackbone) else (nn.Conv2d,)
    names = [name for name, module in model.backbone.named_modules() if isinstance(module, kinds)]
    return [f"backbone.{name}" for name in names if kinds == (nn.Conv2d,) or name.endswith(("query", "value"))]


def recorded(task: str) -> dict[int, dict[str, list[Scores]]]:
    """Kept results of a task: {labels per class: {strategy: scores of each draw}}, as `measure` gives them."""
    kept = _scores(task, _recordings(task))
    return {labels: {name: [Scores(*s) for s in draws] for name, draws in by.items()} for labels, by in kept.items()}


def recorded_updates() -> list[Update]:
    """Kept results of `measure_update`, one for each draw, at the learning rate that `recorded` has for it."""
    kept = next(recording["updates"] for recording in _recordings("word order") if "updates" in recording)
    return [Update(ranks, shares, {int(rank): value for rank, value in left.items()}) for ranks, shares, left in kept]


def circumstances(task: str) -> str:
    """What the kept results of a task were measured on, and when, in words."""
    return recorded_on(_recordings(task))


def record(task: str, kept: list[dict], processes: int = 1) -> list[dict]:
    """The recordings `kept` of a task, and one more of what `RECORDED` lists and they lack, if there is any."""
    scores = _scores(task, kept)
    missing = [(labels, name) for labels, names in RECORDED[task].items() for name in names if name not in scores[labels]]
    updates = task == "word order" and not any("updates" in recording for recording in kept)
    if not missing and not updates:
        return kept
    cells = [(task, name, labels, draw) for labels, name in missing for draw in range(DRAWS[task])]
    added: dict = {"scores": {}, "steps": TASKS[task].steps}
    added["learning_rates"] = {name: learning_rates(task, name) for _, name in missing}
    with ProcessPoolExecutor(processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        values = dict(zip(cells, pool.map(_measure_cell, cells), strict=True))
        for labels, name in missing:
            draws = [values[task, name, labels, draw] for draw in range(DRAWS[task])]
            added["scores"].setdefault(str(labels), {})[name] = scores[labels][name] = draws
        if updates:
            rates = [lr for lr, *_ in scores[100]["everything"]]
            added["updates"] = list(pool.map(_measure_update, range(DRAWS[task]), rates))
    return [*kept, added | here_and_now("torch", "transformers", "scikit-learn")]


def _recordings(task: str) -> list[dict]:
    return json.loads(RECORD.read_text(encoding="utf-8"))[_known(task)]


def _scores(task: str, recordings: list[dict]) -> dict[int, dict[str, list]]:
    """What of `RECORDED` the recordings hold, in its order."""
    scores: dict[int, dict[str, list]] = {labels: {} for labels in RECORDED[task]}
    for labels, by in ((int(n), by) for recording in recordings for n, by in recording["scores"].items()):
        scores.setdefault(labels, {}).update(by)
    return {
        labels: {name: scores[labels][name] for name in names if name in scores[labels]}
        for labels, names in RECORDED[task].items()
    }


def _known(task: str) -> str:
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(map(repr, TASKS))}, got {task!r}.")
    return task


def _last(k: int) -> str:
    return "last stage" if k == 1 else f"last {k} stages"


def _measure_cell(cell: tuple[str, str, int, int]) -> list[float | None]:
    torch.set_num_threads(1)
    scores = measure(*cell)
    kept = [scores.lr, *(round(value, 4) if isinstance(value, float) else value for value in scores[1:])]
    print(*cell, *kept, flush=True)
    return kept


def _measure_update(draw: int, lr: float) -> list:
    torch.set_num_threads(1)
    ranks, shares, left = measure_update(draw, lr)
    print("update", draw, lr, left, flush=True)
    return [ranks, [round(share, 4) for share in shares], {str(rank): round(value, 4) for rank, value in left.items()}]


if __name__ == "__main__":
    kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    tasks = {task: record(task, kept.get(task, [])) for task in TASKS}
    write_text(RECORD, json.dumps(tasks, indent=1) + "\n")
