"""What chapter 04 asks besides which strategy is best: each study is measured for five draws of the labelled digits.

    the probe alone    accuracy of a linear probe, before any step of fine-tuning
    features moved     how far each of five strategies moves the features of test digits
    overfitting        validation accuracy during training, with wrong labels and with clean ones
    cures              accuracy with wrong labels, with each cure and without
    rates              what 100 steps do at a low, a good and a high learning rate

Results are kept in `studies.json`. `python -m helpers.recordings.studies` measures what is missing there, in
minutes, and adds it as a recording of its own, with its machine, versions and date; those before it stay as they are.
"""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import nn

from helpers.backbones import classifier
from helpers.data import Examples, digits, jitter
from helpers.environment import here_and_now, recorded_on
from helpers.features import extract
from helpers.files import write_text
from helpers.finetune import EarlyStopping, probe_head
from helpers.forgetting import letters_kept, printed
from helpers.recordings.strategies import FIVE, TASKS, recorded, train
from helpers.training import History, evaluate, fit

DRAWS = 5
BATCH = TASKS["digits"].batch_size
RECORD = Path(__file__).with_suffix(".json")


def with_errors(examples: Examples, share: float, seed: int) -> Examples:
    """The same examples, that share of their labels replaced by wrong ones.

    Args:
        examples: of two classes or more.
        share: of the labels, from 0.0 to 1.0.
        seed: decides which labels, and what they become.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(examples.labels), generator=generator)[: int(share * len(examples.labels))]
    labels, classes = examples.labels.clone(), len(examples.classes)
    labels[rows] = (labels[rows] + torch.randint(1, classes, (len(rows),), generator=generator)) % classes
    return examples._replace(labels=labels)


def the_probe_alone(draw: int) -> dict[str, float]:
    """Accuracy of a linear probe on 10 digits of each class: on handwritten test digits, and on printed ones."""
    model, examples = _fresh(draw), digits("train", labels_per_class=10, draw=draw)
    probe_head(model, "head", examples.inputs, examples.labels, 1e-2)
    return {"inside": evaluate(model, digits("test")), "outside": evaluate(model, printed())}


def features_moved(draw: int) -> dict[str, float]:
    """How far training moves an image's features, as a share of their length: mean over the test digits.

    By strategy, with 10 labels per class and the learning rate that `recorded` has for the draw.
    """
    examples, inputs = digits("train", labels_per_class=10, draw=draw), digits("test").inputs
    old, moved = extract(_fresh().backbone, inputs), {}
    for strategy in FIVE:
        model, lr = _fresh(draw), recorded("digits")[10][strategy][draw].lr
        train(strategy, model, examples, lr, TASKS["digits"].steps, BATCH, seed=draw)
        new = extract(model.backbone, inputs)
        moved[strategy] = ((new - old).norm(dim=1) / old.norm(dim=1)).mean().item()
    return moved


def overfitting(draw: int) -> dict[str, list[float]]:
    """Accuracy on validation digits every 20 steps: with 60 of 200 labels wrong, and with 100 clean ones."""
    wrong, clean = _with_wrong_labels(draw), digits("train", labels_per_class=10, draw=draw)
    return {name: [*_learn(e, draw)[1].accuracy.values()] for name, e in (("wrong labels", wrong), ("clean labels", clean))}


def cures(draw: int) -> dict[str, float]:
    """Accuracy on test digits after training with 60 of 200 labels wrong: with each cure, and with none."""
    examples = _with_wrong_labels(draw)
    varied = jitter(examples, copies=30, seed=draw)
    models = {
        "none": _learn(examples, draw)[0],
        "lower learning rate": _learn(examples, draw, lr=1e-4)[0],
        "weight decay 0.3": _learn(examples, draw, weight_decay=0.3)[0],
        "early stopping": _learn(examples, draw, patience=3)[0],
        "augmentation": _learn(varied, draw)[0],
        "augmentation, stopped": _learn(varied, draw, patience=3)[0],
        "frozen, penalty 0.001": _fresh(draw),
        "frozen, penalty 1": _fresh(draw),
    }
    for cure, penalty in (("frozen, penalty 0.001", 1e-3), ("frozen, penalty 1", 1.0)):
        probe_head(models[cure], "head", examples.inputs, examples.labels, penalty)
    return {cure: evaluate(model, digits("test")) for cure, model in models.items()}


def rates(draw: int) -> dict[str, list[float]]:
    """By learning rate, what 100 steps of everything leave: accuracy on test digits, and on letters."""
    left = {}
    for lr in ("1e-4", "3e-3", "1e-1"):
        model = _fresh(draw)
        train("everything", model, digits("train", labels_per_class=10, draw=draw), float(lr), 100, BATCH, seed=draw)
        left[lr] = [evaluate(model, digits("test")), letters_kept(model.backbone)]
    return left


STUDIES: dict[str, Callable[[int], dict]] = {
    "the probe alone": the_probe_alone,
    "features moved": features_moved,
    "overfitting": overfitting,
    "cures": cures,
    "rates": rates,
}


def studied(study: str) -> dict[str, list]:
    """Kept results of one of `STUDIES`: {name: what was found with each draw}."""
    draws = next(recording["results"][study] for recording in _recordings() if study in recording["results"])
    return {name: [results[name] for results in draws] for name in draws[0]}


def circumstances() -> str:
    """What the kept results were measured on, and when, in words."""
    return recorded_on(_recordings())


def record(kept: list[dict], processes: int = 1) -> list[dict]:
    """The recordings `kept`, and one more of what `STUDIES` lists and they lack, if there is any."""
    missing = [study for study in STUDIES if not any(study in recording["results"] for recording in kept)]
    if not missing:
        return kept
    results: dict[str, list] = {study: [] for study in missing}
    cells = [(study, draw) for study in missing for draw in range(DRAWS)]
    with ProcessPoolExecutor(processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        for (study, _), measured in zip(cells, pool.map(_measure_cell, cells), strict=True):
            results[study].append(measured)
    return [*kept, {"results": results} | here_and_now("torch", "scikit-learn")]


def _recordings() -> list[dict]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def _fresh(draw: int = 0) -> nn.Sequential:
    return classifier(TASKS["digits"].backbone(True), 10, seed=draw)


def _with_wrong_labels(draw: int) -> Examples:
    return with_errors(digits("train", labels_per_class=20, draw=draw), 0.3, seed=draw)


def _learn(
    examples: Examples, draw: int, lr: float = 1e-3, weight_decay: float = 1e-4, patience: int | None = None
) -> tuple[nn.Module, History]:
    """Train everything for 200 steps; with patience, until that many scores in a row were no better than the best."""
    model = _fresh(draw)
    stopping = EarlyStopping(model, patience) if patience else None
    settings = {"steps": 200, "lr": lr, "weight_decay": weight_decay, "batch_size": BATCH, "seed": draw, "progress": False}
    history = fit(model, examples, validation=digits("validation"), every=20, early_stopping=stopping, **settings)
    return model, history


def _measure_cell(cell: tuple[str, int]) -> dict[str, float | list[float]]:
    torch.set_num_threads(1)
    study, draw = cell
    results = {name: _rounded(value) for name, value in STUDIES[study](draw).items()}
    print(*cell, results, flush=True)
    return results


def _rounded(value: float | list[float]) -> float | list[float]:
    return [round(v, 4) for v in value] if isinstance(value, list) else round(value, 4)


if __name__ == "__main__":
    kept = _recordings() if RECORD.exists() else []
    write_text(RECORD, json.dumps(record(kept), indent=1) + "\n")
