"""One training step of LoRA, its time and its peak memory: beside peft's, and beside training everything or the head alone.

A step is forward, backward, AdamW and zero_grad on one batch, in one thread, with the modes of `helpers.training.fit`:
what is wholly frozen is in eval mode. LoRA has rank 8 and trains the head too. Weights are random.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.memory import held_bytes, peak_bytes
from benchmarks.timing import Comparison
from helpers import lora
from helpers.finetune import train_only
from helpers.text import mean_pool
from helpers.timing import timed
from helpers.training import one_thread, train_mode

CLASSES = 10
RANK, ALPHA = 8, 16


class TextClassifier(nn.Module):
    """An encoder of `transformers`, the mean over tokens, and a linear head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(mean_pool(states, attention_mask))


class Task(NamedTuple):
    """A model, a batch, and what of the model is adapted and trained."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    labels: Tensor
    targets: list[str]
    head: str


def minilm(batch: int = 16, tokens: int = 32, **config) -> Task:
    """A BertModel in the shape of all-MiniLM-L6-v2, or as `config` has it, LoRA on query and value."""
    from transformers import BertConfig, BertModel

    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536} | config
    model = TextClassifier(BertModel(BertConfig(**shape), add_pooling_layer=False))
    ids = torch.randint(model.encoder.config.vocab_size, (batch, tokens))
    return Task(model, (ids, torch.ones_like(ids)), torch.randint(CLASSES, (batch,)), ["query", "value"], "head")


def resnet18(batch: int = 8, size: int = 64) -> Task:
    """torchvision's resnet18, LoRA on every convolution."""
    from torchvision import models

    model = models.resnet18(num_classes=CLASSES)
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return Task(model, (torch.randn(batch, 3, size, size),), torch.randint(CLASSES, (batch,)), targets, "fc")


class Step:
    """One step of training what requires gradients; call it."""

    def __init__(self, model: nn.Module, task: Task, device: str) -> None:
        self.model, self.device = model.to(device), device
        self.inputs, self.labels = tuple(x.to(device) for x in task.inputs), task.labels.to(device)
        train_mode(self.model)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self) -> None:
        with one_thread():
            F.cross_entropy(self.model(*self.inputs), self.labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device != "cpu":
            torch.cuda.synchronize(self.device)

    def peak_bytes(self) -> int:
        """Of one more step: weights, batch, the optimizer's state, and what comes and goes."""
        state = [x for values in self.optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
        there = [*self.model.parameters(), *self.model.buffers(), *self.inputs, self.labels, *state]
        return held_bytes(x for x in there if x.device.type == torch.device(self.device).type) + peak_bytes(self, self.device)


def ours(task: Task) -> nn.Module:
    """A copy with LoRA layers of `helpers.lora`."""
    model = copy.deepcopy(task.model)
    lora.inject(model, task.targets, RANK, ALPHA, train=task.head)
    return model


def peft(task: Task) -> nn.Module:
    """A copy with peft's LoRA layers. The head is unfrozen by hand: `modules_to_save` would keep a second one."""
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(task.model)
    config = LoraConfig(target_modules=task.targets, r=RANK, lora_alpha=ALPHA, lora_dropout=0.0)
    adapted = get_peft_model(model, config)
    model.get_submodule(task.head).requires_grad_(True)
    return adapted


def head(task: Task) -> nn.Module:
    """A copy of which the head alone trains."""
    model = copy.deepcopy(task.model)
    train_only(model, task.head)
    return model


def everything(task: Task) -> nn.Module:
    """A copy that trains whole."""
    return copy.deepcopy(task.model).requires_grad_(True)


Variant = Callable[[Task], nn.Module]


def steps(make: Callable[[], Task], first: Variant, second: Variant, device: str) -> tuple[Step, Step]:
    """The step of both variants of one model."""
    torch.manual_seed(0)
    task = make()
    return Step(first(task), task, device), Step(second(task), task, device)


def _times(make: Callable[[], Task], first: Variant, second: Variant, device: str):
    return lambda: tuple(timed(step) for step in steps(make, first, second, device))


def _peaks(make: Callable[[], Task], first: Variant, second: Variant, device: str):
    return lambda: tuple(step.peak_bytes for step in steps(make, first, second, device))


def comparisons(device: str = "cpu") -> list[Comparison]:
    """The rows of the table, on "cpu" or "cuda"."""
    rows = []
    for name, make in (("MiniLM's shape", minilm), ("resnet18", resnet18)):
        pairs = (
            ("LoRA", "`inject`", "peft", ours, peft, 31, 1.0),
            ("LoRA beside everything", "LoRA", "everything", ours, everything, 7, None),
            ("head alone beside everything", "head", "everything", head, everything, 7, None),
        )
        for what, mine, theirs, first, second, rounds, target in pairs:
            arguments = (make, first, second, device)
            rows += [
                Comparison(f"{name}, {what}, step", mine, theirs, _times(*arguments), rounds, target),
                Comparison(f"{name}, {what}, peak memory", mine, theirs, _peaks(*arguments), 2, target, unit="bytes"),
            ]
    return rows


COMPARISONS = comparisons()
