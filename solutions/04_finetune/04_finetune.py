# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Fine-tuning
#
# A linear probe leaves the network as it is. Fine-tuning goes on training it: some of it or all of it, with one learning
# rate or many, at once or one *stage* after another. Each way spends the same labels and the same steps differently. This
# chapter measures what each way gains, on images like those in training and on images of another kind, and what the network
# forgets.
#
# | | |
# |---|---|
# | you need | chapters 00 and 02; no GPU, no network |
# | time | three hours for you; 19 seconds for two CPU cores (measured; without a GPU) |
# | exercises | 7 |
#
# Afterwards you can
#
# - say which parameters train, and prove it,
# - give each stage a learning rate of its own, and read back from the optimizer whether it has it,
# - unfreeze in the middle of training without losing what the optimizer knows,
# - start fine-tuning where a linear probe ended, and say when that helps,
# - see a network learn its examples by heart, and stop it in time,
# - find a learning rate without spoiling the network.
#
# Words in *italics* at their first use are in the [glossary](../../docs/glossary.md).

# %%
import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from grader import check, continue_with, hint, progress, quiz
from helpers.features import drop_head, extract, linear_probe

# %% [markdown]
# ## One hundred images, three questions
#
# The network is `glyphnet`, trained on rendered letters. The task is handwritten digits, with **10 labelled examples of
# each**. Fine-tuning all of the network on these 100 images should beat the linear probe on new handwritten digits. We ask
# two more questions, about data *out of distribution* and about *forgetting*. What does the fine-tuned network make of
# **printed** digits, the same ten classes in another domain, from which it saw no image? And does it still know its
# **letters**, if we give back the head that it had for them?
#
# **Predict before you run.** After fine-tuning everything, what fraction does the network get right of each: handwritten
# digits, printed digits, letters? Before fine-tuning, a linear probe gets 0.95 of the handwritten digits and 0.86 of the
# printed ones, and the network knows 0.98 of the letters.

# %% tags=["demo"]
from helpers.predict import predict

guess = predict(handwritten=None, printed=None, letters=None)  # from 0.0 to 1.0

# %% [markdown]
# As in chapter 02, one variable decides what the chapter runs on: `"hub"` takes `resnet18` and photographs of cats and
# dogs. Printed digits and letters belong to `"embedded"`. With another profile those two columns stay empty, the learning
# rates are still those chosen for digits, and the runs need a GPU. The recorded results, and what the text says about
# results, are about `"embedded"`.

# %% tags=["demo"]
import helpers.profiles
from helpers.backbones import classifier, stages
from helpers.training import evaluate, fit

profile = helpers.profiles.choose("embedded")
train = [profile.images("train", labels_per_class=10, draw=draw) for draw in range(3)]
validation, test = profile.images("validation"), profile.images("test")


def fresh(draw=0):
    """The pre-trained backbone with a new, random head: model.backbone, model.head."""
    return classifier(profile.image_backbone(), len(test.classes), seed=draw)


print("stages from stem to head:", ", ".join(stages(fresh())))
print(
    f"images: {len(train[0].labels)} to train on, {len(validation.labels)} to choose "
    f"on, {len(test.labels)} to test on"
)

# %% tags=["demo"]
import matplotlib.pyplot as plt

from helpers.figures import draws_figure, show, style

if profile.outside:
    other = profile.outside()
    fig, axes = plt.subplots(2, 10, figsize=(7, 1.8))
    for row, (examples, title) in enumerate(
        ((test, "handwritten"), (other, "printed"))
    ):
        for label in range(10):
            axes[row, label].imshow(
                examples.inputs[examples.labels == label][0][0], cmap="gray"
            )
            axes[row, label].axis("off")
        axes[row, 0].set_title(title, fontsize=9, loc="left")
    show(
        fig, "Ten handwritten digits above ten printed ones, bent, slanted and blurred."
    )

# %% [markdown]
# # Part 1: what trains, and how fast

# %% [markdown]
# ## Exercise 4.1: exactly these parts
#
# A parameter trains if its flag `requires_grad` is True. A module has no such flag: Python silently lets you set an
# attribute of that name on it, and nothing trains. A strategy such as "only the head" is a list of parts. It must not
# depend on what was frozen before.
#
# **Exercise 4.1** (20 min, ●●○). Write `train_only`.
#
# *Core*
#
# 1. Afterwards `requires_grad` is True for the parameters in the named parts, and False for all others, normalisation
#    included, whatever it was before.
# 2. A name stands for one module with everything inside, or for one parameter: `blocks.1` is neither `blocks.10` nor
#    `decoder.blocks.1`.
# 3. It returns the names of the trainable parameters, each once, in the order of `named_parameters()`.
#
# *Fine print*
#
# 4. A weight that modules share trains if any of these modules is named.
# 5. A name that the model does not have raises a `ValueError`, and then no flag has changed.
# 6. Only flags change: values, buffers and modes stay.


# %%
def train_only(model: nn.Module, names: list[str]) -> list[str]:
    """Make exactly the named parts of a model trainable, in place.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    >>> train_only(model, ["2", "0.bias"])
    ['0.bias', '2.weight', '2.bias']

    Args:
        model: any model, with some parameters frozen or none.
        names: of modules or parameters, as `model.named_modules()` and
            `model.named_parameters()` spell them: "fc", "layer1.0", "fc.bias".

    Returns:
        The names of all parameters that train now.
    """
    ### BEGIN SOLUTION
    parts = dict(model.named_modules()) | dict(model.named_parameters())
    unknown = [name for name in names if name not in parts]
    if unknown:  # before anything has changed
        raise ValueError(f"not in the model: {unknown}")
    model.requires_grad_(False)
    for name in names:
        parts[name].requires_grad_(True)  # modules and parameters both have this method
    return [name for name, p in model.named_parameters() if p.requires_grad]
    ### END SOLUTION


# %%
check("4.1", train_only)

# %%
train_only = continue_with("4.1")

# %% [markdown]
# ### How much is "the last stage"?
#
# Stages differ in size. `report` counts their parameters, and the bytes that gradients and AdamW's two *moments* take.

# %% tags=["demo"]
from helpers.finetune import report

model = fresh()
names = stages(model)
for way, parts in (
    ("head only", names[-1:]),
    ("last stage", names[-2:]),
    ("everything", names),
):
    train_only(model, list(parts))
    print(f"--- {way}\n{report(model)}\n")

# %% [markdown]
# Three quarters of `glyphnet` are in its last stage: "the last stage only" trains most of it. Count parameters, not
# stages.
#
# And look at the last table again. It says "everything" and trains 308,506 of 308,538. The 32 that are missing are the
# weight and bias of `bn1`: the norm stands between `conv1` and `layer1`, in none of the modules that we named. `train_last`
# in the library counts stages instead. Each of them goes on until the next begins:

# %% tags=["demo"]
from helpers.finetune import train_last

print(
    [
        name
        for name in train_last(model, len(names))
        if "bn1" in name and "layer" not in name
    ]
)
print(f"{report(model).trainable:,} of {report(model).all:,} parameters train")

# %% [markdown]
# And here is the attribute that does nothing:

# %% tags=["demo"]
model.requires_grad_(False)
model.head.requires_grad = True  # a module, not a parameter
print(
    "trainable parameters:",
    sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    ),
)
try:
    F.cross_entropy(model(test.inputs[:8]), test.labels[:8]).backward()
except RuntimeError as error:
    print("RuntimeError:", error)

# %% [markdown]
# With everything frozen, torch complains. Had one other parameter been trainable, it would have said nothing.

# %% [markdown]
# ## Exercise 4.2: a learning rate for each stage
#
# A new head has everything to learn. The first stages have little to learn and much to lose, so *discriminative learning
# rates* are lower there. An optimizer holds its parameters in *parameter groups*, dicts with settings. A parameter in no
# group never moves, and a key that the optimizer does not know changes nothing.
#
# **Exercise 4.2** (25 min, ●●○). Write `parameter_groups`.
#
# *Core*
#
# 1. The k-th stage from the end, counted from k = 0, has the learning rate `lr / factor**k`.
# 2. A stage goes on until the next begins. What comes before the first stage belongs to it.
# 3. Parameters with at most one dimension have *weight decay* 0, all others `weight_decay`.
# 4. Every trainable parameter is in one group, a frozen one in none. A stage counts even if all of it is frozen.
#
# *Fine print*
#
# 5. A weight that modules share belongs to the stage where `named_parameters()` lists it.
# 6. `blocks.10` is not a part of `blocks.1`.
# 7. Each group has its own `lr` and `weight_decay`.


# %%
def parameter_groups(
    model: nn.Module,
    lr: float,
    factor: float,
    weight_decay: float,
    stages: tuple[str, ...],
) -> list[dict]:
    """Groups for `torch.optim.AdamW`, with lower learning rates nearer to the stem.

    >>> model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1, bias=False))
    >>> groups = parameter_groups(model, 1.0, 2.0, 0.1, stages=("0", "1"))
    >>> sorted((group["lr"], group["weight_decay"]) for group in groups)
    [(0.5, 0.0), (0.5, 0.1), (1.0, 0.1)]

    Args:
        model: any model; some of its parameters may be frozen.
        lr: the learning rate of the last stage.
        factor: above 1; 2.6 in Howard & Ruder (2018).
        weight_decay: of the parameters with two dimensions or more.
        stages: names of modules from stem to head, none inside another, such as
            ("layer1", "layer2", "fc") or ("embed", "blocks.1", "blocks.10", "fc").
            Where a stage begins and ends, the order of `named_parameters()` decides.

    Returns:
        Dicts with "params", "lr" and "weight_decay". How many, and in which order, is
        up to you.
    """
    ### BEGIN SOLUTION
    groups = []
    stage = 0
    for name, parameter in model.named_parameters():
        for i, begin in enumerate(stages):
            if name.startswith(begin + "."):  # with the dot: not blocks.10 for blocks.1
                stage = i
        if parameter.requires_grad:
            k = len(stages) - 1 - stage
            decay = weight_decay if parameter.ndim > 1 else 0.0
            group = {"params": [parameter], "lr": lr / factor**k}
            groups.append(group | {"weight_decay": decay})
    return groups
    ### END SOLUTION


# %%
check("4.2", parameter_groups)

# %%
parameter_groups = continue_with("4.2")

# %% [markdown]
# ### Read it back
#
# An optimizer does what its groups say, not what we meant. Below are your groups, and those of two recipes that people use.
# `lr_scale` is a key that timm's schedulers read; torch's optimizers carry it along and never look at it.

# %% tags=["demo"]
recipes = {
    "parameter_groups": lambda model: parameter_groups(model, 1e-2, 2.6, 0.01, names)
}
recipes["layers and head"] = lambda model: [
    {"params": model.get_submodule(name).parameters(), "lr": 1e-2 / 2.6**k}
    for k, name in enumerate(reversed(names[1:]))
]
recipes["lr_scale"] = lambda model: [
    {"params": list(model.get_submodule(name).parameters()), "lr_scale": 2.6**-k}
    for k, name in enumerate(reversed(names))
]
for recipe, make in recipes.items():
    model = fresh()
    optimizer = torch.optim.AdamW(make(model), lr=1e-2)
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    shown = []
    for name in names:
        inside = [
            rates.get(id(parameter), 0)
            for parameter in model.get_submodule(name).parameters()
        ]
        shown.append(f"{name.removeprefix('backbone.')} {max(inside):.5f}")
    lost = [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) not in rates
    ]
    print(f"{recipe}: " + "  ".join(shown))
    print(f"    in no group: {', '.join(lost) or 'none'}")

# %% [markdown]
# The second recipe is the popular one: it names the layers and the head, and forgets the stem. The third lists all modules,
# loses the norm between two of them, and gives every stage the same rate. There is no warning: a parameter in no group gets
# gradients, and no step moves it.
#
# Learning rates under `lr` survive a *schedule*: most of torch's schedulers multiply the rate that each group starts with.
# (`OneCycleLR` does not: give it one `max_lr` per group.)

# %% tags=["demo"]
model = fresh()
groups = parameter_groups(model, 1e-2, 2.6, 0.01, names)
rates = []


def watch(step, optimizer, scheduler):
    rates.append(sorted({group["lr"] for group in optimizer.param_groups}))


fit(model, train[0], steps=60, lr=1e-2, batch_size=8, groups=groups, before_step=watch)
fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
for k, name in enumerate(names):
    ax.plot(
        [row[k] for row in rates],
        label=name.removeprefix("backbone."),
        markevery=8,
        markersize=4,
        **style(k),
    )
ax.set(yscale="log", xlabel="step", ylabel="learning rate")
ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower center")
show(
    fig,
    "Six learning rates, one per stage: a rise over the first tenth of steps, a "
    "cosine down, each 2.6 times the next.",
)

# %% [markdown]
# ## Exercise 4.3: unfreeze, and tell the optimizer
#
# *Gradual unfreezing* trains the head first and lets one stage after the other join in. Two things decide whether a
# parameter trains: `requires_grad` says whether it gets a gradient, and the optimizer whether it moves. Nobody tells the
# optimizer about a new stage. A new optimizer is no solution: the old one holds the momentum, or Adam's moments, of what
# has trained so far.
#
# **Exercise 4.3** (20 min, ●●○). Write `unfreeze_into`.
#
# *Core*
#
# 1. Afterwards all of `parameters` are trainable, whatever iterable they come in.
# 2. Parameters that the optimizer did not have, frozen or not, join it with the learning rate `lr` and otherwise its
#    defaults.
# 3. Parameters that the optimizer already had stay in their group.
# 4. Everything else stays: learning rates, what the optimizer remembers, gradients that wait for a step.
#
# *Fine print*
#
# 5. A parameter that comes twice is in the optimizer once. Two parameters with equal values are two.
# 6. If nothing is new, no group is added.


# %%
def unfreeze_into(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], lr: float
) -> None:
    """Make parameters trainable; those that the optimizer lacks join it, in place.

    >>> head, block = nn.Linear(4, 2), nn.Linear(4, 4).requires_grad_(False)
    >>> optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    >>> _ = unfreeze_into(optimizer, block.parameters(), 0.01)
    >>> [(group["lr"], group["momentum"]) for group in optimizer.param_groups]
    [(0.1, 0.9), (0.01, 0.9)]

    Args:
        optimizer: any of torch's, in the middle of training, with one group or more.
        parameters: a list, or a generator such as `model.layer4.parameters()`.
            Some may be in the optimizer already, and those may be frozen.
        lr: the learning rate of those that join.

    Returns:
        Nothing has to be returned: the optimizer stays the same object.
    """
    ### BEGIN SOLUTION
    groups = optimizer.param_groups
    known = {id(parameter) for group in groups for parameter in group["params"]}
    new = []
    for parameter in parameters:
        parameter.requires_grad_(True)
        if id(parameter) not in known:
            known.add(id(parameter))
            new.append(parameter)
    if new:
        optimizer.add_param_group({"params": new, "lr": lr})
    ### END SOLUTION


# %%
check("4.3", unfreeze_into)

# %%
unfreeze_into = continue_with("4.3")

# %% [markdown]
# ### What a new optimizer forgets, and what a schedule misses
#
# A head trains for 30 steps. Then the last stage joins, in two ways. AdamW divides each gradient by a running mean of its
# size; a new optimizer has no such mean yet.


# %% tags=["demo"]
def after_thirty_steps():
    model = fresh()
    train_only(model, ["head"])
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=3e-3)
    features = extract(model.backbone, train[0].inputs)
    for _ in range(30):
        loss = F.cross_entropy(model.head(features), train[0].labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()  # or the next backward pass adds to the last gradient
    return model, optimizer


last = names[-2]
for way in ("unfreeze_into", "a new optimizer"):
    model, optimizer = after_thirty_steps()
    if way == "unfreeze_into":
        unfreeze_into(optimizer, model.get_submodule(last).parameters(), 3e-4)
    else:
        model.get_submodule(last).requires_grad_(True)
        optimizer = torch.optim.AdamW(
            [
                {"params": model.head.parameters()},
                {"params": model.get_submodule(last).parameters(), "lr": 3e-4},
            ],
            lr=3e-3,
        )
    remembered = optimizer.state.get(model.head.weight, {})
    before = model.head.weight.detach().clone()
    F.cross_entropy(model.eval()(train[0].inputs), train[0].labels).backward()
    optimizer.step()
    moved = (model.head.weight - before).abs().mean()
    print(
        f"{way:<16} steps remembered of the head: {int(remembered.get('step', 0)):>2} "
        f"  its next step: {moved:.5f} per weight"
    )

# %% [markdown]
# Adam's very first step divides each gradient by its own size, so it moves nearly every weight by the whole learning rate.
# With a new optimizer, the head goes through that again. Only gradients as small as Adam's `eps` of 1e-8 escape: at 1e-8
# the step is 50 % of the rate, at 1e-10 it is 1 %.
#
# A scheduler keeps a list of the learning rates that the groups started with. `add_param_group` adds nothing to that list:

# %% tags=["demo"]
model, optimizer = after_thirty_steps()
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
for _ in range(5):
    optimizer.step()
    scheduler.step()
unfreeze_into(optimizer, model.get_submodule(last).parameters(), 3e-4)
try:
    optimizer.step()
    scheduler.step()
except Exception as error:
    print(f"{type(error).__name__}: {error}")
print(
    "learning rates:",
    [f"{group['lr']:.6f}" for group in optimizer.param_groups],
    "known to the scheduler:",
    len(scheduler.base_lrs),
)

# %% [markdown]
# The message names neither the scheduler nor the group. The head's learning rate went down as planned; that of the new
# group stays where it is. The library's version also tells the scheduler: with
# `helpers.finetune.unfreeze_into(..., scheduler=scheduler)` the new group follows the schedule as if it had been there from
# the start. `GradualUnfreezing` does that for one stage after the other, from head to stem, as Howard & Ruder (2018) did
# for a language model, epoch by epoch.

# %% tags=["demo"]
from helpers.finetune import GradualUnfreezing

model = fresh()
schedule = GradualUnfreezing(model, lr=1e-2, steps=60)
rates = []


def watch(step, optimizer, scheduler):
    schedule(step, optimizer, scheduler)
    now = {group["name"]: group["lr"] for group in optimizer.param_groups}
    rates.append([now.get(name, float("nan")) for name in names])


fit(
    model,
    train[0],
    steps=60,
    lr=1e-2,
    batch_size=8,
    groups=schedule.groups,
    before_step=watch,
)
fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
for k, name in enumerate(names):
    ax.plot(
        [row[k] for row in rates],
        label=name.removeprefix("backbone."),
        markevery=8,
        markersize=4,
        **style(k),
    )
ax.set(yscale="log", xlabel="step", ylabel="learning rate")
ax.legend(frameon=False, fontsize=8, ncols=2, loc="lower left")
show(
    fig,
    "Six learning rates: the head's begins at step 0, and every ten steps the stage "
    "before joins, on the same schedule.",
)

# %% [markdown]
# # Part 2: where to start

# %% [markdown]
# ## Exercise 4.4: the head first
#
# A new head starts at random, so its first errors are large and mean nothing. Through its random weights they reach the
# backbone as gradients and spoil good features. Kumar et al. (2022) call the cure *LP-FT*: make the head a *linear probe*
# on the features, then fine-tune everything. You know the probe from chapter 02, but not where to put it: an optimizer may
# exist already, and holds parameters, not names.
#
# **Exercise 4.4** (20 min, ●●○). Write `probe_head`.
#
# *Core*
#
# 1. The head computes what the linear probe with that `penalty` computes on the features.
# 2. Features are what enters the head when every module is in eval mode.
# 3. The head is the layer called `head`, wherever it stands.
# 4. The head's layer and its `Parameter` objects stay the same: an optimizer goes on training them.
# 5. Everything else stays: parameters, buffers, `requires_grad`, modes.
#
# *Fine print*
#
# 6. The probe covers all classes of the head, even if `labels` lack the last.
# 7. No hook or changed `forward` is left.


# %%
def probe_head(
    model: nn.Module,
    head: str,
    inputs: Tensor | Sequence,
    labels: Tensor,
    penalty: float,
) -> None:
    """Make the head the linear probe on the features that enter it, in place.

    `drop_head`, `extract` and `linear_probe` are yours to use.

    >>> model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    >>> inputs, labels = 3 * torch.eye(2), torch.tensor([0, 1])
    >>> probe_head(model, "2", inputs, labels, 0.001)
    >>> model(inputs).argmax(1)
    tensor([0, 1])

    Args:
        model: its last step is the `nn.Linear`, with a bias, that `named_modules` calls
            `head`. It may hold BatchNorm and dropout, and be partly in train mode.
        head: "fc", or "classifier.2" inside another module.
        inputs: (n, ...). With the profile "hub" a list of paths: `extract` takes both.
        labels: (n,), whole numbers from 0 to the head's out_features - 1.
        penalty: as for `linear_probe`. On `inputs`, each probability may differ from
            the probe's by less than 0.01.
    """
    ### BEGIN SOLUTION
    layer = model.get_submodule(head)
    features = extract(drop_head(model, head), inputs)
    probe = linear_probe(features, labels, layer.out_features, penalty)
    with torch.no_grad():
        layer.weight.copy_(probe.weight)
        layer.bias.copy_(probe.bias)
    ### END SOLUTION


# %%
check("4.4", probe_head)

# %%
probe_head = continue_with("4.4")

# %% [markdown]
# ### What a random head does to the backbone
#
# Before the first step, how large is the gradient that the head sends into the backbone?
# %% tags=["demo"]
from helpers.features import take

STEPS, BATCH = 300, 32  # the budget of every run below
probed = fresh()
probe_head(probed, "head", train[0].inputs, train[0].labels, 1e-2)
for start, model in (("random head", fresh()), ("head from the probe", probed)):
    model.eval()
    total = 0.0
    for rows in torch.arange(len(train[0].labels)).split(
        BATCH
    ):  # in parts, as photographs need much memory
        logits = model(take(train[0].inputs, rows, "cpu"))
        loss = F.cross_entropy(logits, train[0].labels[rows], reduction="sum") / len(
            train[0].labels
        )
        loss.backward()
        total += loss.item()
    norm = sum(
        parameter.grad.square().sum() for parameter in model.backbone.parameters()
    ).sqrt()
    print(f"{start:<20} loss {total:.3f}   gradient into the backbone {norm:.3f}")

# %% [markdown]
# ## The same budget, five ways
#
# Now the question of the beginning: 100 images, 300 steps of 32, five draws of the images. Each way had three learning
# rates (the head alone had higher ones), and the best on the 200 validation images was kept, for each draw. All of this was
# run before and recorded; two of the five ways run again here, on the first draw. The search looked at handwritten digits
# alone, as it would in practice: no rate was chosen for printed digits or letters. (200 labels to choose with are a luxury,
# if 100 are all you train on.) The column "features moved" says how far an image's features ended from where they were, as
# a share of their norm.
#
# - **head only**: the backbone is frozen.
# - **last stage**: that stage and the head train.
# - **everything**: all stages train, from a random head.
# - **gradual unfreezing**: head first, one stage more every 50 steps.
# - **LP-FT**: the probe's head first, then everything (Kumar et al. 2022).

# %% tags=["demo"]
from helpers.recordings import studies
from helpers.recordings.strategies import FIVE, circumstances, recorded

HERE = ("everything", "LP-FT")  # what runs here; any of FIVE
kept = recorded("digits")[10]
original = profile.image_backbone()


def distance(backbone, examples):
    """How far training moved images' features, as a share of their norm: the mean."""
    old, new = (extract(network, examples.inputs) for network in (original, backbone))
    return ((new - old).norm(dim=1) / old.norm(dim=1)).mean().item()


def spend(way, draw):
    model, lr = fresh(draw), kept[way][draw].lr
    settings = {"steps": STEPS, "lr": lr, "batch_size": BATCH, "seed": draw}
    if way == "head only":
        train_only(model, ["head"])
    elif way == "last stage":
        train_only(model, [names[-2], "head"])
    elif way == "gradual unfreezing":
        schedule = GradualUnfreezing(model, lr, STEPS, factor=1, weight_decay=1e-4)
        settings |= {"groups": schedule.groups, "before_step": schedule}
    elif way == "LP-FT":
        probe_head(model, "head", train[draw].inputs, train[draw].labels, 1e-2)
    started = time.perf_counter()
    fit(model, train[draw], **settings)
    seconds = time.perf_counter() - started
    outside = evaluate(model, other) if profile.outside else float("nan")
    source = profile.source(model.backbone) if profile.source else float("nan")
    return (
        evaluate(model, test),
        outside,
        source,
        distance(model.backbone, test),
        seconds,
    )


here = {way: spend(way, 0) for way in HERE}
moved = studies.studied("features moved")
print(
    f"{'first draw':<22}{'handwritten':>13}{'printed':>10}{'letters':>10}"
    f"{'features moved':>17}{'seconds':>9}"
)
for way, (*scores, share, seconds) in here.items():
    print(
        f"{way + ', here':<22}{scores[0]:>13.3f}{scores[1]:>10.3f}{scores[2]:>10.3f}"
        f"{share:>17.2f}{seconds:>9.1f}"
    )
    then = kept[way][0]
    print(
        f"{way + ', recorded':<22}{then.inside:>13.3f}{then.outside:>10.3f}"
        f"{then.source:>10.3f}{moved[way][0]:>17.2f}"
    )

# %% tags=["demo"]
print(f"five draws, {circumstances('digits')}")
guess.beside(
    {
        "handwritten": [scores.inside for scores in kept["everything"]],
        "printed": [scores.outside for scores in kept["everything"]],
        "letters": [scores.source for scores in kept["everything"]],
    }
)
show(
    *draws_figure(
        {
            title: {way: [getattr(scores, key) for scores in kept[way]] for way in FIVE}
            for title, key in (
                ("handwritten (trained on)", "inside"),
                ("printed (another domain)", "outside"),
                ("letters (forgetting)", "source"),
            )
        }
    )
)
print(f"features moved, five draws, {studies.circumstances()}")
for way in FIVE:
    print(
        f"    {way:<20}{torch.tensor(moved[way]).mean():.2f} ± "
        f"{torch.tensor(moved[way]).std():.2f}"
    )

# %% [markdown]
# On handwritten digits all five means lie within 0.015 of each other. That is less than a user would notice, but it is not
# nothing: LP-FT beats the head alone in 5 of 5 draws. On printed digits they are far apart, and everything from a random
# head is last, 0.078 behind the frozen backbone. Every way into the backbone costs letters, and everything from a random
# head costs most.
#
# People sometimes say: "Freeze the base, add a head, and it does not learn." The head does learn: see the first row.
#
# The spread between draws is large, but all ways had the same draws. So compare draw by draw:


# %% tags=["demo"]
def against(way, other_way, key):
    """Mean and spread of the differences, and in how many draws the first is ahead."""
    differences = torch.tensor(
        [getattr(a, key) - getattr(b, key) for a, b in zip(kept[way], kept[other_way])]
    )
    ahead = int((differences > 0).sum())
    gain = f"{differences.mean():+.3f} ± {differences.std():.3f}"
    return f"{gain} (ahead in {ahead} of {len(differences)})"


for way, other_way in (
    ("everything", "head only"),
    ("LP-FT", "everything"),
    ("LP-FT", "head only"),
    ("gradual unfreezing", "everything"),
    ("discriminative", "everything"),
):
    print(f"{way} against {other_way}")
    for key, title in (
        ("inside", "handwritten"),
        ("outside", "printed"),
        ("source", "letters"),
    ):
        print(f"    {title:<12} {against(way, other_way, key)}")

# %% [markdown]
# Kumar et al. (2022) report, averaged over ten data sets: fine-tuning is 2 % ahead of the probe inside the distribution and
# 7 % behind outside; LP-FT is 1 % ahead of fine-tuning inside and 10 % outside. On our digits, with 10 labels per class,
# all four signs are the same, and the sizes are close. Their explanation is the gradient measured above: a random head
# sends large gradients into good features before it fits itself. The features moved accordingly: in every draw they moved
# further from a random head than from the probe.
#
# "Discriminative" is everything with the learning rates of exercise 4.2. Like gradual unfreezing, it keeps more letters
# than everything at one rate.
#
# ### Which strategy when
#
# Which strategy suits how many labels? The table comes from the same record (5 draws each, best of three learning rates on
# validation), with 2, 10 and 50 labelled images per class.

# %% tags=["demo"]
table = recorded("digits")
print(f"{'':<20}{'trains':>9}" + "".join(f"{f'{n} per class':>26}" for n in table))
print(f"{'':<29}" + f"{'inside':>10}{'outside':>16}" * len(table))
for way in (*FIVE, "discriminative"):
    row = f"{way:<20}{table[10][way][0].trainable:>9,}"
    for scores in (by[way] for by in table.values()):
        inside, outside = (
            torch.tensor([getattr(score, key) for score in scores])
            for key in ("inside", "outside")
        )
        row += f"{inside.mean():>10.3f}{outside.mean():>8.3f} ± {outside.std():.3f}"
    print(row)
worst = min(table[50]["LP-FT"], key=lambda score: score.source)
print(
    f"LP-FT with 50 per class, the draw that forgot most: learning rate {worst.lr}, "
    f"validation {worst.validation:.3f}, "
    f"handwritten {worst.inside:.3f}, printed {worst.outside:.3f}, letters "
    f"{worst.source:.3f}"
)

# %% [markdown]
# Read it by column. With 2 labels per class, everything from a random head is behind the frozen backbone even inside.
# With 50, every way into the backbone is ahead inside. Outside, everything from a random head is last at every number
# of labels. No row is best in every column: what you need to know is how many labels you have, and whether the data to
# come look like them.
#
# The last line is a warning. With 50 labels LP-FT has by far the largest spread outside: in one draw of five the
# highest learning rate was the best on validation, and most of the letters were gone. Validation images come from
# inside the distribution, so choosing on them cannot see that. (One source, one target, one network: measure on yours.)
#
# # Part 3: when to stop, and how large a step

# %% [markdown]
# ## Exercise 4.5: stop in time, and go back to the best
#
# With few examples a network that trains long enough learns them by heart (*overfitting*), and its validation score falls
# again. *Early stopping* ends training when the score has not improved for a while, and goes back to the best state. What
# you kept may be another state, and no error tells you.
#
# **Exercise 4.5** (25 min, ●●○). Write `EarlyStopping`.
#
# *Core*
#
# 1. `step` says stop once none of the last `patience` scores was above the best before them.
# 2. Any score above the best is better, by however little; one that equals the best is not.
# 3. `restore` puts parameters and buffers back to what they were at the best score.
# 4. `restore` works in place: an optimizer built before goes on training the model.
# 5. After `restore` the best score is still the best, for `step` and for another `restore`.
#
# *Fine print*
#
# 6. NaN counts as a score and is never the best, not even as the first.
# 7. Two objects do not disturb each other.


# %%
class EarlyStopping:
    """Keep the best state of a model, and say when to stop waiting for a better one.

    >>> model = nn.Linear(1, 1)
    >>> stopping = EarlyStopping(model, patience=2)
    >>> [stopping.step(score) for score in (0.7, 0.9, 0.8, 0.9)]
    [False, False, False, True]
    >>> stopping.restore()  # the weights that had 0.9 first

    Args:
        model: any model. Others, such as an optimizer, hold its parameters, too.
        patience: a whole number, at least 1.
    """

    def __init__(self, model: nn.Module, patience: int) -> None:
        ### BEGIN SOLUTION
        self.model, self.patience = model, patience
        self.best, self.waited, self.state = float("-inf"), 0, None
        ### END SOLUTION

    def step(self, score: float) -> bool:
        """Take note of a score; larger is better. It may be below zero, or NaN.

        Returns:
            True means stop. After the first True, it may return anything.
        """
        ### BEGIN SOLUTION
        if score > self.best:  # False for NaN
            self.best, self.waited = score, 0
            state = self.model.state_dict()
            self.state = {name: tensor.clone() for name, tensor in state.items()}
        else:
            self.waited += 1
        return self.waited >= self.patience
        ### END SOLUTION

    def restore(self) -> None:
        """Put back the best state: all that `state_dict` holds.

        It is called only after at least one score that is a number.
        """
        ### BEGIN SOLUTION
        self.model.load_state_dict(self.state)
        ### END SOLUTION


# %%
check("4.5", EarlyStopping)

# %%
EarlyStopping = continue_with("4.5")

# %% [markdown]
# ### Overfitting, made visible
#
# On the 100 clean images overfitting hardly shows: the training loss goes to zero, and the accuracy on new digits stays up.
# So let us take data as they are when labelling was cheap: 20 images per class, and **three labels in ten are wrong**. A
# network that learns these by heart learns the errors too.

# %% tags=["demo"]
careless = studies.with_errors(
    profile.images("train", labels_per_class=20), 0.3, seed=0
)


def learn(examples, lr=1e-3, weight_decay=1e-4, patience=None):
    model = fresh()
    stopping = None if patience is None else EarlyStopping(model, patience)
    settings = {
        "steps": 200,
        "lr": lr,
        "weight_decay": weight_decay,
        "batch_size": BATCH,
        "seed": 0,
    }
    history = fit(
        model,
        examples,
        validation=validation,
        every=20,
        early_stopping=stopping,
        **settings,
    )
    return model, history


spoiled, history = learn(careless)
fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
for number, (name, draws) in enumerate(studies.studied("overfitting").items()):
    for draw, scores in enumerate(draws):
        label = None if draw else f"validation, {name}, recorded"
        ax.plot(
            range(20, 201, 20),
            scores,
            label=label,
            markersize=3,
            alpha=0.5,
            linewidth=0.8,
            **style(number + 1),
        )
ax.plot(
    *zip(*history.accuracy.items()),
    label="validation, wrong labels, here",
    markersize=5,
    **style(0),
)
ax.set(xlabel="step", ylabel="accuracy", ylim=(0, 1))
loss = ax.twinx()
loss.plot(history.loss, color="0.75", linewidth=0.8)
loss.set_ylabel("training loss here, grey (nats)", color="0.5")
ax.legend(frameon=False, loc="center right")
print(f"five draws, {studies.circumstances()}")
show(
    fig,
    "With wrong labels validation accuracy rises within 40 to 60 steps and then "
    "falls; with clean labels it stays up.",
)

# %% [markdown]
# ### Cures
#
# Each cure was recorded on the same five draws. *Augmentation* trains on 30 copies of each image, shifted, turned and
# stretched a little. The last two freeze the backbone and train the head as a probe, with a weak penalty and with a strong
# one. Your `EarlyStopping` runs here, on the first draw. (`cures` in `helpers/recordings/studies.py` has each in a line or
# two.)

# %% tags=["demo"]
cured = studies.studied("cures")
stopped, _ = learn(careless, patience=3)
for name, model in (("none", spoiled), ("early stopping", stopped)):
    print(
        f"first draw, {name:<16} here {evaluate(model, test):.3f}   recorded "
        f"{cured[name][0]:.3f}"
    )
print(f"five draws, {studies.circumstances()}")
show(*draws_figure({"accuracy on test images": cured}))

# %% [markdown]
# Of the cures that train the whole network, stopping in time helps most: the network learns what the labels have in common
# before it learns each by heart. Augmentation helps, since the network sees no image twice, but alone it helps less than
# stopping. Weight decay of this size does next to nothing: in each step AdamW shrinks a weight by learning rate times
# weight decay, which makes at most 6 % in all 200 steps. A lower learning rate was too low here: 200 steps do not get it
# far enough.
#
# Freezing alone is no cure: a head of 1,290 parameters learns all 60 errors by heart, and ends below the network that
# trains everything. With a strong penalty the same head cannot, and does as well as stopping. A cure is a guess until
# you have measured it on your data.
#
# (The stopped runs chose on 200 clean validation images. If those have errors too, use a larger set.)

# %% [markdown]
# ## Exercise 4.6a: put everything back
#
# Which learning rate is good? Next we train with many, and some of them are too high. By the end the model is ruined, and
# so is what the optimizer remembers. Both have to come back as they were. A *context manager* does that for any block of
# code: it looks before, and puts back after.
#
# **Exercise 4.6a** (20 min, ●●○). Write `put_back`. When the block has ended:
#
# *Core*
#
# 1. Parameters and buffers have the values that they had before the block.
# 2. Each module is in the mode that it was in before.
# 3. Each group of the optimizer has its old learning rate and other settings.
# 4. The optimizer remembers what it did before; a new one remembers nothing.
# 5. Model and optimizer hold the same `Parameter` objects.
#
# *Fine print*
#
# 6. An exception that ends the block, even `KeyboardInterrupt`, is passed on; all is put back.
# 7. Gradients that were waiting are back; where there was none, there is none.
# 8. Buffers with `persistent=False` are put back, too.


# %%
@contextmanager
def put_back(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """After the `with`, model and optimizer are as before, whatever trained them.

    >>> layer = nn.Linear(1, 1)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> with put_back(layer, optimizer):
    ...     optimizer.param_groups[0]["lr"] = 5.0
    ...     print(optimizer.param_groups[0]["lr"])
    5.0
    >>> optimizer.param_groups[0]["lr"]
    0.1

    Args:
        model: any model. Inside the block its values, modes and gradients may change,
            not its modules.
        optimizer: over parameters of the model, such as SGD with momentum, or Adam
            with its moments and its count of steps.

    Returns:
        What a `with` statement takes: with `contextmanager`, a generator with one
        `yield`. A class with `__enter__` and `__exit__` will do, too.
    """
    ### BEGIN SOLUTION
    tensors = [*model.parameters(), *model.buffers()]
    values = copy.deepcopy(tensors)
    gradients = copy.deepcopy([parameter.grad for parameter in model.parameters()])
    modes = {module: module.training for module in model.modules()}
    memory = copy.deepcopy(optimizer.state_dict())  # it refers to the live moments
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values):
                tensor.copy_(value)
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.grad = gradient
        for module, training in modes.items():
            module.training = training
        optimizer.load_state_dict(memory)
    ### END SOLUTION


# %%
check("4.6a", put_back)

# %%
put_back = continue_with("4.6a")

# %% [markdown]
# ## Exercise 4.6: find a learning rate, and leave no trace
#
# Train on each batch with a higher learning rate than on the batch before, and note the loss (Smith 2017, section 3.3). If
# it is too low, nothing happens; if too high, the loss may explode; in between it falls fastest.
#
# **Exercise 4.6** (20 min, ●●○). Write `find_lr`.
#
# *Core*
#
# 1. Batch `k` of `n`, from 0, has the learning rate `lowest * (highest / lowest) ** (k / (n - 1))`.
# 2. The group whose own rate is largest gets the batch's rate; the others keep their ratio to it.
# 3. Each batch is one step of `optimizer` in train mode, whatever modes the model comes in. Its cross-entropy before that step
#    is noted.
# 4. A loss above 4 times the smallest so far, or not finite, ends the search. It is noted only if it is finite.
# 5. Afterwards model and optimizer are as they were, modes and gradients included.
#
# *Fine print*
#
# 6. A loss of exactly 0 counts as a loss.
# 7. The returned losses hold no graph.


# %%
def find_lr(
    model: nn.Module,
    optimizer: Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    lowest: float,
    highest: float,
) -> tuple[list[float], list[float]]:
    """The loss of each batch while the learning rate rises, one step for each batch.

    >>> model = nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))] * 3
    >>> lrs, losses = find_lr(model, optimizer, batches, 0.01, 1.0)
    >>> [round(lr, 4) for lr in lrs], len(losses)
    ([0.01, 0.1, 1.0], 3)

    Args:
        model: n inputs -> (n, classes) logits. No parameter has a gradient yet.
        optimizer: over its parameters, in one group or several.
        batches: at least 2 pairs (inputs, labels), each trained on once, in order.
        lowest, highest: the learning rates of the first and of the last batch.

    Returns:
        (lrs, losses), two lists of one length. Tensors with one number in them will do.
        Whether the step of the last batch is still made is up to you.
    """
    ### BEGIN SOLUTION
    own = [group["lr"] for group in optimizer.param_groups]
    lrs, losses = [], []
    with put_back(model, optimizer):
        model.train()
        for k, (inputs, labels) in enumerate(batches):
            lr = lowest * (highest / lowest) ** (k / (len(batches) - 1))
            loss = F.cross_entropy(model(inputs), labels)
            if not loss.isfinite():
                break
            lrs.append(lr)
            losses.append(loss.item())
            if losses[-1] > 4 * min(losses):
                break
            for group, rate in zip(optimizer.param_groups, own):
                group["lr"] = lr * rate / max(own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return lrs, losses
    ### END SOLUTION


# %%
check("4.6", find_lr)

# %%
find_lr = continue_with("4.6")

# %% tags=["demo"]
model = fresh()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(0)
batches = []
for _ in range(60):
    rows = torch.randint(len(train[0].labels), (BATCH,), generator=generator)
    batches.append((take(train[0].inputs, rows, "cpu"), train[0].labels[rows]))
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
lrs, losses = find_lr(model, optimizer, batches, 1e-6, 10.0)
same = all(
    torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()
)
print(f"{len(lrs)} of {len(batches)} batches used; the model is as it was: {same}")
print(
    f"the optimizer has its learning rate, {optimizer.param_groups[0]['lr']}, and its "
    f"state: {len(optimizer.state)} entries"
)
fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
ax.plot(lrs, losses, markersize=4, **style(0))
ax.set(
    xscale="log",
    xlabel="learning rate of this one batch",
    ylabel="loss before the step (nats)",
)
show(
    fig,
    "The loss against the learning rate: flat, then falling to almost nothing, where "
    "the search ends.",
)

# %% [markdown]
# No explosion here: the search ended because one small loss was above four times a still smaller one. Batch after batch
# came from the same 100 images, and by then the network knew them. On small data, read the fall of this curve and not
# its end.
#
# The usual rule takes the learning rate where the loss falls fastest. Is it any good? Three tries of 100 steps: with the
# suggestion, with a thirtieth of it and with thirty times as much. The figure has five recorded draws, for a suggestion
# that was rounded to 3e-3.

# %% tags=["demo"]
from helpers.finetune import LearningRates

suggested = LearningRates(lrs, losses).suggestion
models = {suggested * factor: fresh() for factor in (1 / 30, 1, 30)}
for lr, model in models.items():
    fit(model, train[0], steps=100, lr=lr, batch_size=BATCH)
print(f"suggested learning rate: {suggested:.1e}")
for lr, model in models.items():
    letters = (
        f"   letters {profile.source(model.backbone):.3f}" if profile.source else ""
    )
    print(f"    with {lr:.1e}: test images {evaluate(model, test):.3f}{letters}")
print(f"five draws, {studies.circumstances()}")
tries = studies.studied("rates")
panels = {"test images": 0, "letters (after training)": 1}
show(
    *draws_figure(
        {
            title: {lr: [found[k] for found in draws] for lr, draws in tries.items()}
            for title, k in panels.items()
        }
    )
)

# %% [markdown]
# The suggestion is a good start. With a thirtieth of it, training is not done after 100 steps. With thirty times as much
# the test images are still read, and the letters are gone. Accuracy on the task alone would not have shown it.
#
#
# # At the end
#
# ## Turn the knobs
#
# See how much of a real backbone trains at each depth, what that costs, and what it gained in recorded runs.

# %% tags=["demo"]
from helpers.explorers import explore_freezing

explore_freezing()

# %% [markdown]
# ## Quiz
#
# Click on a choice to see whether it is right, and why. The order of the choices changes each time.

# %% tags=["demo"]
quiz("finetune")

# %% tags=["demo"]
progress()

# %% [markdown]
# ## Common mistakes

# %% [markdown]
# ## Takeaways
#
# - What trains is a flag on parameters, and what is stepped is a group in the optimizer. Read both back.
# - A stage that is in no group does not train, and no error says so. The stem is the one that gets lost.
# - A learning rate is real if it is under "lr" in the optimizer's group.
# - To unfreeze in the middle of training, keep the optimizer, compare parameters by identity, and tell the schedule.
# - With few labels from one domain, look at accuracy outside of it: ways that look alike inside differ there.
# - A random head sends large gradients into the backbone. From the probe, the features moved less and more accuracy was
#   kept outside, unless the learning rate was too high.
# - Keep the best state as a copy. `state_dict()` is the live model.
# - Overfitting may not show in accuracy on clean data. Cures are guesses until measured.
#
# Words: [augmentation](../../docs/glossary.md#augmentation), [discriminative learning
# rates](../../docs/glossary.md#discriminative-learning-rates), [early stopping](../../docs/glossary.md#early-stopping),
# [fine-tuning](../../docs/glossary.md#fine-tuning), [forgetting](../../docs/glossary.md#forgetting), [gradual
# unfreezing](../../docs/glossary.md#gradual-unfreezing), [LP-FT](../../docs/glossary.md#lp-ft), [out of
# distribution](../../docs/glossary.md#out-of-distribution), [overfitting](../../docs/glossary.md#overfitting),
# [parameter group](../../docs/glossary.md#parameter-group), [schedule](../../docs/glossary.md#schedule),
# [stage](../../docs/glossary.md#stage), [weight decay](../../docs/glossary.md#weight-decay).
