"""What LoRA saves, by rank, layers and optimizer: the figure of `helpers.explorers.explore_lora`, and its numbers.

    weights              all parameters; with LoRA also A and B
    gradients            as much as what trains
    optimizer state      SGD keeps none, momentum one number for each parameter that trains, AdamW two

Shapes come from the weights' files, the arithmetic from `helpers.lora.cost`, accuracy from `helpers.recordings.strategies`.
Activations depend on the batch, and are not counted.
"""

import math
import re
import statistics
from functools import cache
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors import safe_open
from torch import nn

from helpers import backbones, lora
from helpers.explorers.figures import choice, size
from helpers.figures import COLORS, plot_draws
from helpers.recordings import strategies

HIGHEST = 64  # rank that is offered
OPTIMIZERS = {"SGD": "sgd", "SGD with momentum": "momentum", "AdamW": "adamw"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Backbone(NamedTuple):
    """A network, which of its layers can be adapted, and where accuracy with LoRA is recorded."""

    title: str
    task: str  # of helpers.recordings.strategies
    labels: int  # per class
    classes: int  # of the head
    layers: dict[str, str]  # what is offered -> the weights' names, as a regular expression
    recorded: str  # which of these the record has


BACKBONES = {
    "MiniLM": Backbone(
        "all-MiniLM-L6-v2",
        "word order",
        100,
        2,
        {"queries and values": r"\.(query|value)\.", "all attention": r"\.attention\.", "every nn.Linear": ""},
        "queries and values",
    ),
    "glyphnet": Backbone(
        "glyphnet", "digits", 10, 10, {"last stage": r"^layer4\.", "every convolution": ""}, "every convolution"
    ),
}


class Memory(NamedTuple):
    """Bytes that training takes, and how many parameters train."""

    weights: int
    gradients: int
    state: int
    trainable: int

    @property
    def all(self) -> int:
        return self.weights + self.gradients + self.state


class Network(NamedTuple):
    """What is counted of a backbone and its head. The layers have shapes alone: they are on the meta device."""

    layers: dict[str, nn.Module]  # each nn.Linear or nn.Conv2d, by the name of its weight
    backbone: int  # parameters
    head: int


@cache
def network(backbone: str) -> Network:
    """The shapes in a backbone's file of weights, which is read in milliseconds: importing `transformers` takes seconds."""
    known = _known(backbone)
    file = backbones.WEIGHTS if backbone == "glyphnet" else backbones._minilm_folder() / "model.safetensors"
    with safe_open(file, "pt") as weights:
        names = weights.keys()
        shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
    # neither the head and the pooler, which are taken off, nor buffers
    left = r"^(fc|pooler)\.|^(mean|std)$|\.(running_mean|running_var|num_batches_tracked|position_ids)$"
    shapes = {name: shape for name, shape in shapes.items() if not re.search(left, name)}
    layers = {}
    for name, shape in shapes.items():
        if len(shape) == 4:
            layers[name] = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False, device="meta")
        elif len(shape) == 2 and "embeddings" not in name:
            layers[name] = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    features = backbones.GlyphNet.width if backbone == "glyphnet" else shapes["embeddings.LayerNorm.weight"][0]
    return Network(layers, sum(map(math.prod, shapes.values())), (features + 1) * known.classes)


def adapted(backbone: str, layers: str) -> list[nn.Module]:
    """The layers that get an adapter, in the order of their names.

    Args:
        backbone: one of `BACKBONES`.
        layers: one of its `layers`.
    """
    pattern = choice(f"layers of {backbone}", layers, _known(backbone).layers)
    return [layer for name, layer in network(backbone).layers.items() if re.search(pattern, name)]


def ranks(backbone: str, layers: str) -> list[int]:
    """Powers of 2 up to the smaller side of the smallest matrix that is adapted, and to 64."""
    most = min(min(layer.weight.flatten(1).shape) for layer in adapted(backbone, layers))
    return [2**power for power in range(HIGHEST.bit_length()) if 2**power <= most]


def memory(backbone: str, layers: str, rank: int, optimizer: str, precision: str) -> dict[str, Memory]:
    """What training takes with "head only", "LoRA" (adapters and head) and "everything".

    Args:
        backbone, layers, rank: what is adapted, as for `adapted` and `ranks`.
        optimizer: one of `OPTIMIZERS`.
        precision: one of `PRECISIONS`, of weights, gradients and state alike.
    """
    counted = network(backbone)
    cost = lora.cost(adapted(backbone, layers), rank, choice("optimizer", optimizer, OPTIMIZERS))
    kept = cost["optimizer_bytes"] // cost["gradient_bytes"]  # numbers for each parameter
    everything, adapters = counted.backbone + counted.head, cost["adapter"]
    trains = {"head only": counted.head, "LoRA": adapters + counted.head, "everything": everything}
    width = choice("precision", precision, PRECISIONS).itemsize
    return {
        name: Memory(width * (everything + adapters * (name == "LoRA")), width * count, width * kept * count, count)
        for name, count in trains.items()
    }


def lora_figure(backbone: str, layers: str, rank: int, optimizer: str, precision: str) -> tuple[Figure, str]:
    """Memory by part for three ways to train, what trains, and recorded accuracy; the arguments are those of `memory`.

    Returns:
        The figure, and its text alternative.
    """
    memories = memory(backbone, layers, rank, optimizer, precision)
    cost = lora.cost(adapted(backbone, layers), rank)
    fig = Figure(figsize=(9, 4.3), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=(5, 4))
    _plot_memory(left, memories, optimizer)
    scores = _plot_accuracy(right, backbone, layers, rank)
    title = f"{_known(backbone).title}, {layers}, rank {rank}, {optimizer}, {precision}"
    trained, everything = memories["LoRA"].trainable, memories["everything"].trainable
    trains = (
        f"The adapters train {cost['adapter']:,} numbers, {_times(cost['full'], cost['adapter'])} times fewer than "
        f"the {cost['full']:,} weights they adapt."
    )
    whole = f"With the head {trained:,} train, {_times(everything, trained)} times fewer than all {everything:,}."
    fig.suptitle(f"{title}\n{trains}\n{whole}", fontsize=10)
    parts = [
        f"{name} {size(needed.all)}: {size(needed.weights)} of weights, {size(needed.gradients)} of gradients and "
        f"{size(needed.state) if needed.state else 'nothing'} of optimizer state"
        for name, needed in memories.items()
    ]
    return fig, f"LoRA of {title}. {trains} {whole} Training takes, without activations, with {'; with '.join(parts)}. {scores}"


def recorded_accuracy(backbone: str) -> dict[str, list[float]]:
    """Recorded accuracies with the head alone, LoRA of each rank in order, and everything: one for each draw."""
    known = _known(backbone)
    try:
        kept = strategies.recorded(known.task).get(known.labels, {})
    except KeyError:  # the task has not been recorded yet
        return {}
    measured = sorted((name for name in kept if name.startswith("LoRA rank ")), key=lambda name: int(name.split()[-1]))
    return {name: [scores.inside for scores in kept[name]] for name in ("head only", *measured, "everything") if kept.get(name)}


def _plot_memory(ax: Axes, memories: dict[str, Memory], optimizer: str) -> None:
    """Three bars for each way to train on one logarithmic scale, each with its size beside it."""
    least = 1e3
    state = "optimizer state" if memories["LoRA"].state else "optimizer state: none"
    for number, (part, label) in enumerate((("weights", "weights"), ("gradients", "gradients"), ("state", state))):
        for place, needed in enumerate(memories.values()):
            y, count = place + 0.27 * (number - 1), getattr(needed, part)
            ax.barh(y, max(count - least, 0), left=least, height=0.25, color=COLORS[number], label=None if place else label)
            ax.text(max(count, least) * 1.15, y, size(count) if count else "0", va="center", fontsize=8.5)
    ax.set_yticks(range(len(memories)), [f"{name}\n{size(needed.all)}" for name, needed in memories.items()])
    ax.set(xscale="log", xlim=(least, 3e9), ylim=(len(memories) - 0.5, -0.5))
    ax.set_xticks([1e3, 1e4, 1e5, 1e6, 1e7, 1e8], ["1 kB", "10 kB", "100 kB", "1 MB", "10 MB", "100 MB"], fontsize=8.5)
    ax.minorticks_off()
    ax.set_xlabel(f"memory to train with {optimizer}; logarithmic scale\nactivations come on top and are not counted")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1), ncols=3, frameon=False, fontsize=8.5, handlelength=1, borderpad=0)


def _plot_accuracy(ax: Axes, backbone: str, layers: str, rank: int) -> str:
    """A row for each strategy that is recorded, the chosen rank's marked; what there is, in words."""
    known, results = _known(backbone), recorded_accuracy(backbone)
    if not results:
        message = f"no accuracy is recorded yet\nfor {known.task}"
        ax.text(0.5, 0.5, message, ha="center", va="center", transform=ax.transAxes)
        ax.set(xticks=[], yticks=[])
        return message.replace("\n", " ").capitalize() + "."
    plot_draws(ax, dict(reversed(results.items())), dict.fromkeys(results, 6))  # a colour that is no part's
    chosen, places = f"LoRA rank {rank}", list(reversed(results))
    missing = None
    if layers != known.recorded:
        missing = layers
    elif chosen in results:
        ax.axhspan(places.index(chosen) - 0.4, places.index(chosen) + 0.75, color="0.92", zorder=0)
    else:
        missing = f"rank {rank}"
    values = [value for draws in results.values() for value in draws]
    margin = max(0.02, 0.12 * (max(values) - min(values)))
    ax.set_xlim(min(values) - margin, max(values) + margin)
    ax.set_ylim(-0.6, len(results) - 0.1)
    about = f"recorded with {known.recorded}, AdamW, float32"
    label = f"accuracy on {known.task}, {known.labels} per class; marks are draws\n{about}"
    ax.set_xlabel(f"{label}\nnot recorded: {missing}" if missing else label)
    means = ", ".join(f"{name} {statistics.mean(draws):.3f}" for name, draws in results.items())
    caption = f"Accuracy on {known.task} with {known.labels} labels per class, {about}, mean over draws: {means}."
    return f"{caption} Not recorded: {missing}." if missing else caption


def _times(many: int, few: int) -> str:
    return f"{many / few:,.0f}" if many >= 10 * few else f"{many / few:.1f}"


def _known(backbone: str) -> Backbone:
    return choice("backbone", backbone, BACKBONES)
