"""What a pre-trained network is worth: accuracy against labels per class, four ways to use the same labels.

    raw pixels     logistic regression on the 1,024 pixels of an image; of texts: TF-IDF
    probe          a linear probe on the features of the frozen, pre-trained backbone
    from scratch   the backbone's architecture trained from a random start
    fine-tuned     the backbone trained from its pre-trained weights

Every arm gets the same labelled examples, and the best of three settings on the same validation examples; only then it
sees the test examples. The two that train a network get the same number of steps. The other two are convex:
`linear_probe` goes on to their optimum, so more steps would change nothing.

Training takes long, so its results are kept: those of the digits in glyphnet's card, those of the docstrings in
`transfer.json`, written by `python -m helpers.recordings.transfer` (an hour on one CPU thread).
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from helpers.backbones import TextBackbone, glyphnet, glyphnet_card, text_backbone
from helpers.data import Examples, digits, docstrings
from helpers.environment import here_and_now
from helpers.features import drop_head, extract, linear_probe
from helpers.files import write_text
from helpers.text import embed
from helpers.training import accuracy, fit, seed_everything

PENALTIES = (1e-3, 1e-2, 1e-1)
RECORD = Path(__file__).with_suffix(".json")


class Task(NamedTuple):
    """A target task, and how a backbone is tried on it."""

    baseline: str  # what the baseline's logistic regression sees
    examples: Callable[..., Examples]  # (split, labels_per_class, draw)
    backbone: Callable[[bool], nn.Module]  # pretrained? -> a backbone without a head
    features: Callable[..., Tensor]  # (backbone, inputs) -> what the probe sees
    classes: int
    learning_rates: tuple[float, float, float]
    steps: int
    batch_size: int

    @property
    def arms(self) -> tuple[str, str, str, str]:
        return (self.baseline, "probe", "from scratch", "fine-tuned")


def _glyphnet(pretrained: bool) -> nn.Module:
    return drop_head(glyphnet(pretrained))


def _minilm(pretrained: bool) -> TextBackbone:
    return text_backbone(pretrained=pretrained, max_length=32)


def _embed(backbone: TextBackbone, texts: list[str]) -> Tensor:
    return embed(backbone.encoder, backbone.preprocess, texts)


TASKS = {
    "digits": Task("raw pixels", digits, _glyphnet, extract, 10, (1e-3, 3e-3, 1e-2), steps=300, batch_size=32),
    "docstrings": Task("TF-IDF", docstrings, _minilm, _embed, 6, (5e-5, 1.5e-4, 5e-4), steps=60, batch_size=16),
}


def measure_arm(task: str, arm: str, labels_per_class: int, draw: int = 0) -> float:
    """Test accuracy of one arm, its setting chosen on validation.

    Args:
        task: "digits" or "docstrings".
        arm: one of `TASKS[task].arms`.
        labels_per_class: as many as the task has.
        draw: which labelled examples, and the seed of training.
    """
    known = _task(task)
    if arm not in known.arms:
        raise ValueError(f"arm must be one of {', '.join(map(repr, known.arms))}, got {arm!r}.")
    return _measure(known, arm, labels_per_class, draw)


def _measure(known: Task, arm: str, labels_per_class: int, draw: int) -> float:
    train = known.examples("train", labels_per_class, draw)
    held_out = {split: known.examples(split) for split in ("validation", "test")}
    if arm in known.arms[:2]:
        logits = _probes(known, arm, train, held_out)
    else:
        logits = _trained(known, arm == "fine-tuned", train, held_out, draw)
    labels = {split: examples.labels for split, examples in held_out.items()}
    scored = [{split: accuracy(table, labels[split]) for split, table in tables.items()} for tables in logits]
    return max(scored, key=lambda score: score["validation"])["test"]  # the first of equals


def recorded(task: str) -> dict:
    """Kept results of a task: {labels per class: {arm: one accuracy per draw}}, measured as by `measure_arm`."""
    _task(task)
    if task == "digits":
        scores = glyphnet_card()["digits_accuracy"]
    else:
        scores = json.loads(RECORD.read_text(encoding="utf-8"))[task]["accuracy"]
    return {int(labels): arms for labels, arms in scores.items()}


def record(task: str, labels_per_class: tuple[int, ...], draws: int, processes: int = 1) -> dict:
    """Measure every arm of a task: what `recorded` gives, with the machine and the versions."""
    known, cells = _task(task), []
    for labels in labels_per_class:
        cells += [(arm, labels, draw) for arm in known.arms for draw in range(draws)]
    with ProcessPoolExecutor(processes, mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        values = dict(zip(cells, pool.map(partial(_measure_cell, task, known), cells), strict=True))
    return {
        "accuracy": {
            str(labels): {arm: [values[arm, labels, draw] for draw in range(draws)] for arm in known.arms}
            for labels in labels_per_class
        },
        "steps": known.steps,
        "learning_rates": known.learning_rates,
        **here_and_now("torch", "transformers", "scikit-learn"),
    }


def _measure_cell(task: str, known: Task, cell: tuple[str, int, int]) -> float:
    """One number of a record, in a process of its own, with the settings of the process that asks."""
    torch.set_num_threads(1)
    value = round(_measure(known, *cell), 4)
    print(task, *cell, value, flush=True)
    return value


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(map(repr, TASKS))}, got {name!r}.")
    return TASKS[name]


def _probes(task: Task, arm: str, train: Examples, held_out: dict[str, Examples]) -> Iterator[dict[str, Tensor]]:
    if arm == "probe":
        features = task.features(_frozen(task), train.inputs)
        tables = {split: _held_out_features(task, split) for split in held_out}
    else:
        features, *rest = plain_features(train.inputs, *(examples.inputs for examples in held_out.values()))
        tables = dict(zip(held_out, rest, strict=True))
    for penalty in PENALTIES:
        head = linear_probe(features, train.labels, len(train.classes), penalty)
        yield {split: extract(head, table) for split, table in tables.items()}


def plain_features(train: Tensor | list[str], *rest: Tensor | list[str]) -> list[Tensor]:
    """Features without a network, for `train` and for others: pixels of images, TF-IDF of texts (fitted on `train`)."""
    if isinstance(train, Tensor):
        return [inputs.flatten(1) for inputs in (train, *rest)]
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer().fit(train)
    return [torch.from_numpy(words.transform(texts).toarray()).float() for texts in (train, *rest)]


@cache
def _frozen(task: Task) -> nn.Module:
    return task.backbone(True)


@cache
def _held_out_features(task: Task, split: str) -> Tensor:
    return task.features(_frozen(task), task.examples(split).inputs)


def _trained(
    task: Task, pretrained: bool, train: Examples, held_out: dict[str, Examples], seed: int
) -> Iterator[dict[str, Tensor]]:
    for lr in task.learning_rates:
        seed_everything(seed)  # the new head, and from scratch the whole network
        backbone = task.backbone(pretrained)
        model = nn.Sequential(backbone, nn.Linear(backbone.width, len(train.classes)))
        fit(model, train, steps=task.steps, lr=lr, batch_size=task.batch_size, seed=seed, progress=False)
        yield {split: extract(model, examples.inputs) for split, examples in held_out.items()}


if __name__ == "__main__":
    results = record("docstrings", labels_per_class=(2, 5, 10, 20, 50), draws=3)
    write_text(RECORD, json.dumps({"docstrings": results}, indent=1) + "\n")
