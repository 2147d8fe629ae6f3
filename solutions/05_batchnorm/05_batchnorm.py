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
# # 05 · BatchNorm
#
# A ResNet-18 has 20 BatchNorms, and each holds two vectors that no optimizer moves: the mean and the variance of the
# data it was trained on. They move in every forward pass in train mode, and they stay behind when everything else is
# adapted. And "frozen" means one thing in one library and another in the next. This chapter counts what moves,
# measures what wrong statistics cost, and wins most of it back without a single label.
#
# | | |
# |---|---|
# | you need | chapters 00 and 02; no GPU, no network |
# | time | three hours for you; 18 seconds for two CPU cores (measured; without a GPU) |
# | exercises | 6 |
#
# Afterwards you can
#
# - write BatchNorm in plain arithmetic, both of its modes,
# - count what moves in a network that is said to be frozen,
# - tell four meanings of "frozen" apart, by experiment and not by hearsay,
# - freeze BatchNorms so that `model.train()` does not undo it, and undo it yourself,
# - pool statistics over batches of any sizes without losing digits,
# - adapt a network to other data by new statistics alone, and say when that fails.
#
# Words in *italics* at their first use are in the [glossary](../../docs/glossary.md).

# %%
import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from grader import check, continue_with, hint, progress, quiz

# %% [markdown]
# ## Grey paper
#
# `glyphnet` was trained on black ink on white paper, or rather on ones on zeros. With a linear probe on 10 labelled
# digits per class, it reads 95 of 100 handwritten digits. Now the same digits come from another scanner: the paper is
# light grey, 0.3 instead of 0, and the ink is as dark as before. A person still reads them with ease.
#
# **Predict before you run.** What fraction of the digits on grey paper does it get right? And what fraction if all
# weights stay as they are, no label is used, and only the BatchNorms' running statistics are measured again on the grey
# images?

# %% tags=["demo"]
from helpers.predict import predict

guess = predict(
    grey=None, recomputed=None
)  # from 0.0 to 1.0; guessing at random gets 0.1

# %% [markdown]
# (Every shift in this chapter changes pixels, so the chapter runs on `glyphnet` and digits only. `drift`, `freeze`
# and `recompute_statistics` of `helpers.batchnorm` take any network, and batches of whatever it takes.)

# %% tags=["demo"]
from functools import cache

from helpers.backbones import classifier, glyphnet
from helpers.data import digits
from helpers.features import drop_head
from helpers.finetune import probe_head
from helpers.forgetting import printed
from helpers.training import accuracy, evaluate

train = [digits("train", labels_per_class=10, draw=draw) for draw in range(3)]
test = digits("test")


def grey(examples, paper=0.3):
    """The same images on grey paper: 0 becomes `paper`, 1 stays 1."""
    return examples._replace(inputs=paper + (1 - paper) * examples.inputs)


def fresh(draw=0):
    """The pre-trained backbone with a new, random head: model.backbone, model.head."""
    return classifier(drop_head(glyphnet()), len(test.classes), seed=draw)


@cache
def fitted(draw):
    model = fresh(draw)
    probe_head(model, "head", train[draw].inputs, train[draw].labels, 1e-2)
    return model.eval()


def probed(draw=0):
    """The same with a linear probe as its head; each call gives a copy."""
    return copy.deepcopy(fitted(draw))


norms = [
    name
    for name, module in fresh().named_modules()
    if isinstance(module, nn.BatchNorm2d)
]
print(f"{len(norms)} BatchNorms, the first is {norms[0]}")

# %% tags=["demo"]
import matplotlib.pyplot as plt

from helpers.figures import draws_figure, show

fig, axes = plt.subplots(2, 10, figsize=(7, 1.8))
for row, examples in enumerate((test, grey(test))):
    for column in range(10):
        axes[row, column].imshow(
            1 - examples.inputs[column][0], cmap="gray", vmin=0, vmax=1
        )
        axes[row, column].axis("off")
show(
    fig,
    "Ten handwritten digits, black ink on white paper, and below the same on light "
    "grey paper.",
)

# %% [markdown]
# (Ink is drawn black here. In the data ink is 1 and paper is 0.)
#
# # Part 1: what a BatchNorm does

# %% [markdown]
# ## Exercise 5.1: the layer by hand
#
# For each channel, a BatchNorm computes
#
#     y = (x - mean) / sqrt(var + eps) * weight + bias
#
# Two details are easy to get wrong. Squared deviations are summed, then divided by n (*biased variance*) or by n - 1:
# torch uses both, for different things. And *momentum* is a share: of the old value in one framework, of the new one in
# another. Which is it in torch?
#
# **Exercise 5.1** (20 min, ●●○). Write `batch_norm`.
#
# *Core*
#
# 1. In train mode mean and variance are the batch's, over all axes but the channels.
# 2. In *eval mode* mean and variance are the *running statistics*, and no buffer moves.
# 3. In train mode the three buffers become what `layer(x)` would make of them.
# 4. `weight` and `bias` act on each channel, in both modes.
# 5. Gradients are those of `layer(x)`: they flow through mean and variance too.
#
# *Fine print*
#
# 6. The buffers carry no graph.
# 7. Use plain arithmetic, not `F.batch_norm` (the check does not look at this).


# %%
def batch_norm(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """What `layer(x)` computes, in the mode that `layer.training` says.

    >>> layer = nn.BatchNorm1d(1, eps=1.0, affine=False)
    >>> batch_norm(torch.tensor([[0.0], [0.0], [0.0], [4.0]]), layer)
    tensor([[-0.5000],
            [-0.5000],
            [-0.5000],
            [ 1.5000]])

    Args:
        x: (n, channels, ...), with any number of axes after the channels. In train
            mode at least two values per channel.
        layer: an `nn.BatchNorm1d`, `2d` or `3d`, fresh or used, with any `eps`, a
            number as `momentum`, and the buffers `running_mean`, `running_var` and
            `num_batches_tracked`. They may change in place or be new tensors of
            the same shape. With `affine=False` weight and bias are None.

    Returns:
        y, of the shape of x.
    """
    ### BEGIN SOLUTION
    others = [axis for axis in range(x.ndim) if axis != 1]

    def column(values):
        return values.view(-1, *[1] * (x.ndim - 2))  # (channels, 1, ...): broadcasts

    mean, var, share = layer.running_mean, layer.running_var, layer.momentum
    if layer.training:
        mean, var = x.mean(others), x.var(others, correction=0)
        with torch.no_grad():
            unbiased = x.var(others, correction=1)
            layer.running_mean.copy_((1 - share) * layer.running_mean + share * mean)
            layer.running_var.copy_((1 - share) * layer.running_var + share * unbiased)
            layer.num_batches_tracked += 1
    y = (x - column(mean)) / torch.sqrt(column(var) + layer.eps)
    return y if layer.weight is None else y * column(layer.weight) + column(layer.bias)
    ### END SOLUTION


# %%
check("5.1", batch_norm)

# %%
batch_norm = continue_with("5.1")

# %% [markdown]
# ### How far off are the stored statistics?
#
# Each BatchNorm stored what letters look like at its place in the network. What do handwritten digits look like
# there, and what do grey ones? The distance is called *drift*. For the mean it is in units of the stored standard
# deviation; for the standard deviation it is a factor. Each is a root mean square over channels, so it has no sign.

# %% tags=["demo"]
from helpers.batchnorm import drift

model = probed()
print(
    f"{'':<24}{'handwritten':>16}{'grey paper':>16}\n{'':<24}"
    + f"{'mean':>8}{'std':>8}" * 2
)
for white, on_grey in zip(
    drift(model, [test.inputs]), drift(model, [grey(test).inputs])
):
    numbers = "".join(
        f"{layer.mean_shift:>8.2f}{'x' + format(layer.std_ratio, '.2f'):>8}"
        for layer in (white, on_grey)
    )
    print(f"{white.name.removeprefix('backbone.'):<24}{numbers}")

# %% [markdown]
# The means of handwritten digits are close to what the first layers stored, at most 0.14 off up to `layer3`, and less
# close in `layer4`. The standard deviations are not: they are 1.11 to 1.27 times what was stored, and furthest off at
# the start. On grey paper both are further off, in every layer. A shift at the input does not stay there: the mean is
# furthest off in `layer4.0.bn2`, whose output goes into the features.

# %% [markdown]
# ## Exercise 5.2: count what moves
#
# `requires_grad` says what an optimizer may move. Whether a network is frozen is another question: did anything in it
# change? A *buffer* changes without a gradient, without an optimizer, and under `no_grad`. So look at the values.
#
# **Exercise 5.2** (20 min, ●●○). Write `moved`, which names what an action changes in a model.
#
# *Core*
#
# 1. `action()` runs once, as it would by itself, and what it did stays.
# 2. A parameter is named if its values changed, trainable or not.
# 3. A buffer that changed is named too, even if it holds whole numbers or a state dict leaves it out.
# 4. Parameters come first, then buffers, named and ordered as `named_parameters()` and `named_buffers()` list them.
#
# *Fine print*
#
# 5. Any change counts, even the last digit, even two swapped values.
# 6. A NaN that stays has not changed; one that becomes a number has, and so has a number that becomes NaN.
# 7. Values count, not tensors: an action may put a new tensor under an old name.


# %%
def moved(model: nn.Module, action: Callable[[], object]) -> list[str]:
    """Call `action()` and name what it changed in the model.

    >>> layer = nn.BatchNorm1d(2)
    >>> moved(layer, lambda: layer(torch.ones(3, 2)))
    ['running_mean', 'running_var', 'num_batches_tracked']

    Args:
        model: any network. The action leaves names, shapes and dtypes as they are.
        action: takes no arguments: a forward pass, a step of training, whatever a
            caller wants to know about.

    Returns:
        Names of parameters, then names of buffers; `[]` if nothing changed.
    """

    ### BEGIN SOLUTION
    def tensors():
        return [*model.named_parameters(), *model.named_buffers()]

    before = {name: tensor.detach().clone() for name, tensor in tensors()}
    action()
    names = []
    for name, tensor in tensors():
        same = (tensor == before[name]) | (tensor.isnan() & before[name].isnan())
        if not same.all():
            names.append(name)
    return names
    ### END SOLUTION


# %%
check("5.2", moved)

# %%
moved = continue_with("5.2")

# %% [markdown]
# ### The frozen network
#
# A common recipe: freeze all parameters, call `model.train()` at the start of each epoch, train the head. Three
# batches, without even an optimizer. What moves in ours, and in a ResNet-18?

# %% tags=["demo"]
from torchvision.models import resnet18


def three_batches(model, images):
    def action():
        model.train()
        with torch.no_grad():
            for batch in images.split(4)[:3]:
                model(batch)

    return action


for network, images in (
    ("glyphnet", test.inputs),
    ("ResNet-18", torch.rand(12, 3, 64, 64)),
):
    model = fresh() if network == "glyphnet" else resnet18()
    model.requires_grad_(False)
    names = moved(model, three_batches(model, images))
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    moved_buffers, moved_parameters = (
        sum(name in buffers for name in names),
        sum(name in parameters for name in names),
    )
    print(
        f"{network}: moved {moved_parameters} of {len(parameters)} parameters, "
        f"{moved_buffers} of {len(buffers)} buffers"
    )
    for kind in ("running_mean", "running_var", "num_batches_tracked"):
        print(f"    {sum(name.endswith(kind) for name in names):>2} {kind}")

# %% [markdown]
# Every buffer of every BatchNorm moved: in the ResNet 20 means, 20 variances and 20 counters. (Our network has two
# more buffers, the mean and std of its own preprocessing, which belong to no BatchNorm.) The network was said to be
# frozen, and three batches have changed it. What does that do to its accuracy?

# %% tags=["demo"]
before, after = [], []
for draw in range(3):
    model = probed(draw)
    before.append(evaluate(model, test))
    model.requires_grad_(False).train()
    with torch.no_grad():
        for batch in grey(test).inputs.split(4)[:50]:
            model(batch)
    after.append(evaluate(model, test))
show(
    *draws_figure(
        {"accuracy on white paper": {"before": before, "after 50 grey batches": after}}
    )
)

# %% [markdown]
# No parameter has moved, no gradient was computed, and accuracy on white paper is down by more than a tenth.
#
# # Part 2: what "frozen" means

# %% [markdown]
# ## Exercise 5.3: four things called frozen
#
# A BatchNorm has *affine parameters* (weight and bias), two running statistics, and a choice of what to divide by.
# "Frozen" may mean that any one of the three stays as it is, or all of them. Papers and libraries use all four
# meanings, and two versions of Keras differ. Before you fine-tune somebody's network, you want to know which one
# holds. Documentation, flags and settings may tell you. An experiment does.
#
# **Exercise 5.3** (25 min, ●●●). Write `what_is_frozen`: which of three things are frozen in training?
#
# *Core*
#
# 1. "affine": neither weight nor bias gets a gradient.
# 2. "statistics": neither `running_mean` nor `running_var` moves.
# 3. "normalisation": the stored statistics normalise, not those of the batch.
# 4. "In training" means after `layer.train()`, whatever mode you find the layer in.
# 5. What counts is what the layer does, whatever its attributes say.
#
# *Fine print*
#
# 6. Gradients left over from earlier say nothing.
# 7. The layer stays as you found it: statistics and counter, mode, gradients, flags, hooks.


# %%
def what_is_frozen(layer: nn.Module, x: torch.Tensor) -> dict[str, bool]:
    """Find out by experiment what of a BatchNorm is frozen in training.

    >>> layer = nn.BatchNorm1d(2).requires_grad_(False)
    >>> what_is_frozen(layer, torch.arange(12.0).view(6, 2))
    {'affine': True, 'statistics': False, 'normalisation': False}

    Args:
        layer: a BatchNorm, or a subclass that somebody wrote, with `weight`, `bias`,
            `running_mean`, `running_var` and `eps`. It may have been frozen by flags,
            by settings, by a hook, by a `train` or a `forward` of its own. In eval
            mode it normalises with the stored statistics. A `copy.deepcopy` of it
            behaves as it does.
        x: a batch, (n, channels) or (n, channels, height, width), n at least 6. Its
            mean and variance are far from the stored ones.

    Returns:
        {"affine": ..., "statistics": ..., "normalisation": ...}. If all three are
        True, the output has no graph, and backward() would raise.
    """
    ### BEGIN SOLUTION
    tested = copy.deepcopy(layer).train()  # a copy's parameters have no gradients yet
    stored = [tested.running_mean.clone(), tested.running_var.clone()]
    output = tested(x)
    still = all(map(torch.equal, stored, [tested.running_mean, tested.running_var]))
    half = len(x) // 2
    in_less_company = tested(x[:half])
    if output.requires_grad:
        output.square().sum().backward()
    return {
        "affine": tested.weight.grad is None and tested.bias.grad is None,
        "statistics": still,
        "normalisation": torch.allclose(output[:half], in_less_company, atol=1e-4),
    }
    ### END SOLUTION


# %%
check("5.3", what_is_frozen)

# %%
what_is_frozen = continue_with("5.3")

# %% [markdown]
# ### Recipes, put to the test
#
# Here is what people write when they mean "frozen", and what the layer then does in training. Keras is here too,
# translated to PyTorch: before TensorFlow 2, `trainable = False` stopped the weights and the moving averages of a
# BatchNorm, but the layer still normalised with the batch. Since then it normalises with the stored statistics.

# %% tags=["demo"]
from helpers.batchnorm import freeze as reference_freeze

recipes = {
    "nothing": lambda layer: None,
    "requires_grad_(False)": lambda layer: layer.requires_grad_(False),
    "eval(), once": lambda layer: layer.eval(),
    "momentum = 0": lambda layer: setattr(layer, "momentum", 0.0),
    "track_running_stats = False": lambda layer: setattr(
        layer, "track_running_stats", False
    ),
    "Keras before TensorFlow 2": lambda layer: reference_freeze(
        layer, "affine", "statistics"
    ),
    "Keras since": lambda layer: reference_freeze(layer),
    "freeze: affine": lambda layer: reference_freeze(layer, "affine"),
    "freeze: statistics": lambda layer: reference_freeze(layer, "statistics"),
    "freeze: normalisation": lambda layer: reference_freeze(layer, "normalisation"),
}
parts = ("affine", "statistics", "normalisation")
print(f"{'':<28}" + "".join(f"{part:<15}" for part in parts))
for recipe, apply in recipes.items():
    layer = nn.BatchNorm2d(4)
    layer(torch.randn(64, 4, 5, 5))  # no longer new: it has seen data
    apply(layer)
    x = 3 + 2 * torch.randn(8, 4, 5, 5)
    found = what_is_frozen(layer, x)
    print(
        f"{recipe:<28}"
        + "".join(f"{'frozen' if found[part] else '-':<15}" for part in parts)
    )

# %% [markdown]
# Read the third row again: one `eval()` freezes nothing, because the question is what happens in training, and training
# begins with `train()`.
#
# ### What each meaning costs
#
# The target is now grey paper, for training and for testing, with 100 labelled images. Only the head trains, for 100
# steps. So freezing "affine" alone is the same as freezing nothing, and "normalisation" alone is the same as all:
# three cases are left. For each you see two numbers, both on the test digits: accuracy in **train mode**, in batches
# of 32, as a progress bar would show it, and accuracy **afterwards**, in eval mode.


# %% tags=["demo"]
from helpers.progress import progress_bar


def train_under(apply, draw, shift, batch_size=32, lr=1e-2, steps=100):
    """A model whose head was trained with its BatchNorms frozen as `apply` does."""
    model = fresh(draw)
    apply(model)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(draw)
    images, labels = shift(train[draw]).inputs, train[draw].labels
    for _ in range(steps // 10):
        model.train()  # as loops do, at the start of an epoch
        for _ in range(10):
            rows = torch.randperm(len(labels), generator=generator)[:batch_size]
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def in_train_mode(model, examples, batch_size=32):
    """Accuracy of a copy of the model in train mode, batch after batch."""
    seen = copy.deepcopy(model).train()
    with torch.no_grad():
        logits = torch.cat([seen(batch) for batch in examples.inputs.split(batch_size)])
    return accuracy(logits, examples.labels)


meanings = {
    "nothing frozen": lambda model: None,
    "statistics (Keras before TF 2)": lambda model: reference_freeze(
        model, "affine", "statistics"
    ),
    "all (Keras since)": lambda model: reference_freeze(model),
}
during, afterwards = ({name: [] for name in meanings} for _ in range(2))
for name, draw in progress_bar(
    [(name, draw) for name in meanings for draw in range(3)], "training"
):
    model = train_under(meanings[name], draw, grey)
    during[name].append(in_train_mode(model, grey(test)))
    afterwards[name].append(evaluate(model, grey(test)))
show(
    *draws_figure(
        {
            "while training, batches of 32": during,
            "afterwards, in eval mode": afterwards,
        }
    )
)

# %% [markdown]
# **While training**, the first two compute the same: the batch normalises. All looks fine. **Afterwards**, eval mode
# uses the stored statistics. Where nothing was frozen, they have moved to grey paper, and all is well. Frozen as in
# Keras before TensorFlow 2, they are still those of letters on white paper: the head learned on features that it
# never sees again, and most of its accuracy is gone. Nothing during training gave a hint. Frozen as in Keras since
# then, the network computes the same in training and in use, so both numbers agree. They are lower than with
# statistics that followed the data: freeze statistics only where they fit.
#
# Run it with `lambda examples: examples` in place of `grey`. How large is the difference on white paper, where the
# stored statistics nearly fit?

# %% [markdown]
# ## Exercise 5.4: a freeze that lasts
#
# Each epoch begins with `model.train()`, which goes through all modules and sets the mode of each. A BatchNorm in
# eval mode is back in train mode, without a word. A freeze has to survive that call, and you must be able to undo it
# when the whole network is to train.
#
# **Exercise 5.4** (30 min, ●●●). Write `freeze`; it returns `undo`.
#
# *Core*
#
# 1. Frozen BatchNorms normalise as in eval mode, whatever part of the model `train()` is called on.
# 2. Running statistics stay, and weight and bias get no gradient.
# 3. Every BatchNorm is frozen, whatever its kind, name and depth.
# 4. Everything else works as before: dropout, other norms, other parameters, other models.
# 5. After `undo()` and `train()`, statistics move as they did, and the same parameters train.
#
# *Fine print*
#
# 6. Right after `undo()` each BatchNorm has its old mode.
# 7. `freeze` also works for one BatchNorm in two places, and for a model that is itself a BatchNorm.
# 8. `undo()` keeps what the model has learned.


# %%
def freeze(model: nn.Module) -> Callable[[], object]:
    """Freeze every BatchNorm of a model, in place, until undo is called.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> undo = freeze(model)
    >>> _ = model.train()(torch.ones(3, 2))
    >>> model[1].running_mean
    tensor([0., 0.])

    Args:
        model: its BatchNorms all store statistics: `nn.BatchNorm1d`, `2d`, `3d`,
            `nn.SyncBatchNorm`, subclasses, with weight and bias or without. Some
            of its modules may be in eval mode, some of its parameters frozen.

    Returns:
        undo, a function without arguments. If `train()` or `eval()` was called in
        between, a BatchNorm may have the mode that this call set. A parameter that
        was frozen before freeze is frozen after undo.
    """
    ### BEGIN SOLUTION
    kind = nn.modules.batchnorm._BatchNorm
    norms = [module for module in model.modules() if isinstance(module, kind)]
    modes = {norm: norm.training for norm in norms}
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    flags = {parameter: parameter.requires_grad for parameter in parameters}
    for norm in norms:
        norm.eval()
        norm.train = lambda mode=True, norm=norm: norm  # in front of its class's own
    for parameter in flags:
        parameter.requires_grad_(False)

    def undo():
        for norm, mode in modes.items():
            del norm.train
            norm.train(mode)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)

    return undo
    ### END SOLUTION


# %%
check("5.4", freeze)

# %%
freeze = continue_with("5.4")

# %% tags=["demo"]
model = fresh()
action = three_batches(model, test.inputs)  # begins with model.train()
model.eval()
print(
    f"eval(), once  {len(moved(model, action)):>2} buffers moved in three batches of "
    "train mode"
)
undo = freeze(model)
print(f"your freeze   {len(moved(model, action)):>2}")
undo()
print(f"after undo()  {len(moved(model, action)):>2}")

# %% [markdown]
# One `eval()` lasts until the first `train()`. The freeze lasts until you undo it.
#
# ### Small batches
#
# Photographs are large and memory is small, so fine-tuning often runs with batches of 2. A mean over 2 images is a poor
# mean. The head is trained with batches of 32 and of 2 on white paper, 100 steps each, with and without your `freeze`.

# %% tags=["demo"]
ways = {
    "batches of 32, train mode": (lambda model: None, 32, 1e-2),
    "batches of 32, frozen": (freeze, 32, 1e-2),
    "batches of 2, train mode": (lambda model: None, 2, 5e-3),
    "batches of 2, frozen": (freeze, 2, 5e-3),
}
small = {name: [] for name in ways}
for name, draw in progress_bar(
    [(name, draw) for name in ways for draw in range(3)], "training"
):
    apply, batch_size, lr = ways[name]
    small[name].append(
        evaluate(
            train_under(apply, draw, lambda examples: examples, batch_size, lr), test
        )
    )
show(*draws_figure({"accuracy afterwards, in eval mode": small}))

# %% [markdown]
# With batches of 32 the two are less than a point apart, with batches of 2 about ten (both with a lower learning
# rate). In train mode each image is normalised together with one other, so the head learns from features that change
# with the other image. In a frozen network, the size of the batch makes no difference to what a layer computes. Try
# `steps=300`: what is left of the ten points?
#
# ### Gradient accumulation is not a large batch
#
# The usual advice for small memory: run 16 batches of 2, add up their gradients, each divided by 16, then make one
# step (*gradient accumulation*). "The same as one batch of 32." Compare the two gradients, each as one vector over
# all parameters that get one.


# %% tags=["demo"]
def gradient(model, images, labels, parts):
    model.zero_grad()
    for x, y in zip(images.chunk(parts), labels.chunk(parts)):
        (F.cross_entropy(model(x), y) / parts).backward()
    return torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


order = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:32]
images, labels = train[0].inputs[order], train[0].labels[order]
for name, apply in (("train mode", lambda model: None), ("frozen", freeze)):
    for parts in (2, 4, 16):
        model = probed().train()
        apply(model)
        whole, summed = (
            gradient(model, images, labels, 1),
            gradient(model, images, labels, parts),
        )
        cosine = F.cosine_similarity(whole, summed, dim=0)
        off = (summed - whole).norm() / whole.norm()
        times = summed.norm() / whole.norm()
        print(
            f"{name:<11} {parts:>2} parts of {32 // parts:>2}: off by {off:.1e}, "
            f"cosine {cosine:.3f}, {times:.2f} times as long"
        )

# %% [markdown]
# With frozen BatchNorms, the sum is the gradient of the large batch, up to rounding. In train mode it is a different
# gradient: each part is normalised by itself, and adding up gradients does not pool statistics. With parts of 2 the
# sum points elsewhere and is several times too long. Accumulate with frozen BatchNorms, or with norms that do not
# look at the batch.
#
# # Part 3: new statistics

# %% [markdown]
# ## Exercise 5.5: many batches as one
#
# You want the statistics of a data set that comes in batches. The last one is short, and memory does not hold them
# all. The mean of the batches' means is wrong, unless all batches have the same size. The mean of their variances
# ignores that their means differ. And E[x²] - E[x]² is right on paper, but in float32 it subtracts two large numbers
# whose last digits, where they differ, are lost.
#
# **Exercise 5.5** (25 min, ●●●). Write `pooled_statistics`.
#
# *Core*
#
# 1. The mean of a channel is that of all its values, in all batches: every sample and every position counts alike.
# 2. The variance is the unbiased one of the same values, as if they were a single batch.
# 3. With a mean of 100 and a standard deviation of 0.01, the variance is still right to 1 %.
# 4. Batches are read once and not kept.
#
# *Fine print*
#
# 5. A batch may hold a single value per channel.


# %%
from collections.abc import Iterable

from torch import Tensor


def pooled_statistics(batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all batches.

    >>> batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0]])]
    >>> pooled_statistics(batches)
    (tensor([2.]), tensor([4.]))

    Args:
        batches: tensors (n_i, channels) or (n_i, channels, ...) of float32, all with
            the same number of channels, and two values per channel or more in all. A
            list, or a generator, which has no len(). While it gives a batch, memory
            may hold a few others, no more.

    Returns:
        (mean, var), both (channels,).
    """
    ### BEGIN SOLUTION
    n, mean, squares = 0, 0.0, 0.0  # squares: of deviations from the mean, summed
    for batch in batches:
        values = batch.double().transpose(0, 1).flatten(1)  # (channels, values)
        count, own = values.shape[1], values.mean(1)
        shift = own - mean
        within = (values - own[:, None]).square().sum(1)
        squares = squares + within + shift**2 * n * count / (n + count)
        mean = mean + shift * count / (n + count)
        n += count
    return mean.float(), (squares / (n - 1)).float()
    ### END SOLUTION


# %%
check("5.5", pooled_statistics)

# %%
pooled_statistics = continue_with("5.5")

# %% [markdown]
# ### Where the short formula goes wrong
#
# E[x²] - E[x]² in float32, on numbers with standard deviation 0.01 around four means, compared with the variance in
# float64:

# %% tags=["demo"]
for mean in (0, 1, 10, 100):
    x = mean + 0.01 * torch.randn(
        1000, 64, generator=torch.Generator().manual_seed(0)
    )  # 64 channels
    wanted = x.double().var(0)
    short = (x**2).mean(0) - x.mean(0) ** 2
    pooled = pooled_statistics(x.split(33))[1]
    off = [((var - wanted).abs() / wanted).max() for var in (short, pooled)]
    negative = int((short < 0).sum())
    print(
        f"mean {mean:>3}: E[x²]-E[x]² is off by {off[0]:.0e}, {negative:>2} of 64 "
        f"negative; pooled: off by {off[1]:.0e}"
    )

# %% [markdown]
# The square root of a negative variance is NaN. Widely used code has shipped this formula.

# %% [markdown]
# ## Exercise 5.6: new statistics for every layer
#
# The network's weights are good, but its running statistics are those of other data. So measure them again, without
# labels. A few forward passes in train mode will not do: they mix old statistics with a moving average, and dropout
# is on. On the network's own data the exact way is called precise BatchNorm (Wu & Johnson 2021), on other data
# *AdaBN*.
#
# **Exercise 5.6** (30 min, ●●●). Write `recompute_statistics`.
#
# *Core*
#
# 1. While the batches run, BatchNorms normalise with their current batch, and everything else works as in eval mode.
# 2. Afterwards a BatchNorm's statistics are those of all inputs that it saw, as if they were one batch.
# 3. Sentences 1 and 2 hold for every BatchNorm, in train or eval mode.
#
# *Fine print*
#
# 4. With a mean of 100 and a standard deviation of 0.01, the variance is right to 1 %.
# 5. Modes, `momentum`, parameters and `requires_grad` are as before.
# 6. No hook and no batch stays in the model, and the statistics are plain tensors.


# %%
from helpers.modes import eval_mode


def recompute_statistics(model: nn.Module, batches: list[Tensor]) -> None:
    """Replace every BatchNorm's running statistics by those of `batches`, in place.

    >>> layer = nn.BatchNorm1d(1)
    >>> batch = torch.tensor([[0.0], [2.0], [4.0]])
    >>> recompute_statistics(nn.Sequential(layer), [batch])
    >>> layer.running_mean, layer.running_var
    (tensor([2.]), tensor([4.]))

    Args:
        model: has BatchNorms, 1d, 2d or 3d, nested, of any name, with or without weight
            and bias. All of them keep running statistics, and each is called once in a
            forward pass. Each module has a mode of its own.
        batches: inputs for `model(batch)`, of different sizes, each with at least two
            values per channel.

    `running_mean` becomes the mean and `running_var` the unbiased variance; nothing of
    the old ones is left. Plain tensors have no graph and are no inference tensors.
    `num_batches_tracked` does not matter. You may use `pooled_statistics`.
    """
    ### BEGIN SOLUTION
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    seen = {layer: [] for layer in layers}

    def keep(layer, args):
        seen[layer].append(args[0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    with eval_mode(model), torch.no_grad():
        for layer in layers:
            layer.train()
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    for layer in layers:  # only now: each pass in train mode moves the buffers
        mean, var = pooled_statistics(seen[layer])
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    ### END SOLUTION


# %%
check("5.6", recompute_statistics)

# %%
recompute_statistics = continue_with("5.6")

# %% [markdown]
# ### Won back
#
# Back to the question at the start: new statistics, nothing else, and no label.


# %% tags=["demo"]
def adapted(model, images, batch_size=100):
    model = copy.deepcopy(model)
    recompute_statistics(model, list(images.split(batch_size)))
    return model.eval()


models = [probed(draw) for draw in range(3)]
stored = [evaluate(model, grey(test)) for model in models]
recomputed = [
    evaluate(adapted(model, grey(test).inputs), grey(test)) for model in models
]
guess.beside({"grey": stored, "recomputed": recomputed})
passed = []
for model in models:
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        for batch in grey(test).inputs.split(100):
            model(batch)
    passed.append(evaluate(model, grey(test)))
print(
    "one pass in train mode, nothing else:",
    ", ".join(f"{score:.3f}" for score in passed),
)

# %% [markdown]
# This is AdaBN (Li et al. 2016), on our data; `helpers.batchnorm.adabn` does it on a copy, layer after layer. One
# pass in train mode, a common recipe, wins back little: after 8 batches 0.9 to the power of 8, more than 0.4, of the
# old statistics is left.
#
# When does it help, and when not? (Printed digits are rendered from fonts: the same classes in another domain.)

# %% tags=["demo"]
generator = torch.Generator().manual_seed(0)
noise = torch.randn(test.inputs.shape, generator=generator)
shifts = {
    "as they are": test,
    "ink at a quarter": test._replace(inputs=0.25 * test.inputs),
    "grey paper": grey(test),
    "noise 0.2": test._replace(inputs=test.inputs + 0.2 * noise),
    "inverted": test._replace(inputs=1 - test.inputs),
    "printed digits": printed(),
}
panels = {"stored statistics": {}, "recomputed": {}}
for name, examples in progress_bar(shifts.items(), "six shifts"):
    panels["stored statistics"][name] = [evaluate(model, examples) for model in models]
    panels["recomputed"][name] = [
        evaluate(adapted(model, examples.inputs), examples) for model in models
    ]
show(*draws_figure(panels))

# %% [markdown]
# **It helps** on grey paper, and about half-way with noise. **It gains nothing** with ink at a quarter: that is a
# pure change of contrast, but little was lost. It gains nothing with inverted images either: ink and paper have
# swapped roles, and no mean or variance swaps them back. **It costs** two or three points on the images as they are
# and on printed digits: the head was fitted to features with the stored statistics, and those still fit there. So
# keep a few labelled images of the target, and measure before and after. On Office-31, a benchmark of photographs, Li
# et al. (2016) report 75.5 % before and 76.7 % after, on average.
#
# ### How much data does it take, and of which classes?
#
# The statistics of a target depend on its classes and their proportions. What if you have few images, or images of
# one class only?


# %% tags=["demo"]
def after(images):
    """Accuracy of each head, once the statistics are those of these images."""
    return [evaluate(adapted(model, images), grey(test)) for model in models]


def some(count, seed):
    order = torch.randperm(
        len(test.labels), generator=torch.Generator().manual_seed(seed)
    )
    return grey(test).inputs[order[:count]]


samples = {f"{count} images": after(some(count, seed=1)) for count in (30, 100, 800)}
tens = [after(some(10, seed)) for seed in progress_bar(range(12), "twelve tens")]
only_ones = grey(test).inputs[test.labels == 1]
ones = samples[f"{len(only_ones)} images, all ones"] = after(only_ones)
samples = {
    "10 images, twelve times": [score for ten in tens for score in ten]
} | samples
show(*draws_figure({"accuracy on all grey test digits": samples}))
means = torch.tensor(tens).mean(dim=1)
print(f"twelve tens, mean of the heads: {means.min():.3f} to {means.max():.3f}")
better = int((means > torch.tensor(ones).mean()).sum())
print(
    f"all ones: {torch.tensor(ones).mean():.3f}; better than that are {better} of the "
    "twelve tens"
)

# %% [markdown]
# Ten images win most of it back, thirty nearly all, without a label. It matters which ten: accuracy is 0.815 with the
# worst, 0.920 with the best. 81 images of the digit 1 do worse (0.840) than 11 of the 12 samples of ten, although
# they are eight times as many: the statistics of one digit are not those of all. If your sample does not have the
# classes in the target's proportions, you adapt to the sample.
#
# ### What one pass cannot do
#
# While the statistics are measured, each layer normalises with its batch. So what the deeper layers see depends a
# little on how the data are cut into batches. With `passes="sequential"` the reference measures layer after layer,
# with the earlier ones already set. The result does not depend on the cut, but it takes one pass per layer.

# %% tags=["demo"]
from helpers.batchnorm import recompute_statistics as reference_recompute

deepest = "backbone.layer4.0.bn2"
images = grey(test).inputs[:200]
found = {"one": [], "sequential": []}
for passes, batch_size in progress_bar(
    [(passes, size) for passes in found for size in (2, 8, 32, 200)], "eight cuts"
):
    model = copy.deepcopy(models[0])
    reference_recompute(model, list(images.split(batch_size)), passes=passes)
    found[passes].append(
        (
            batch_size,
            model.get_submodule(deepest).running_mean,
            evaluate(model, grey(test)),
        )
    )
for passes, rows in found.items():
    print(
        f"passes={passes!r}, 200 images: the means of layer4.0.bn2 against a single "
        "batch, and accuracy"
    )
    whole = rows[-1][1]
    for batch_size, mean, score in rows:
        print(
            f"    batches of {batch_size:>3}: off by "
            f"{(mean - whole).norm() / whole.norm():.1e}   {score:.3f}"
        )

# %% [markdown]
# In sequential passes, the cut makes no difference beyond rounding. In one pass, batches of 2 leave the deepest means
# several percent off, batches of 32 less than one percent. Accuracy differs by about a point, here in favour of the
# small batches. In practice one pass will do. For a number that others should be able to reproduce, use sequential
# passes.
#
# # At the end
#
# ## Turn the knobs
#
# Choose a shift and its strength. On the left you see how far each layer's mean is off, then its standard deviation,
# with the stored statistics or with new ones. On the right are some of the images, and the accuracy with both (one
# head and 400 test digits, so the numbers are not quite those above). Find a shift that drifts far and costs little,
# and one that drifts hardly further and costs much.

# %% tags=["demo"]
from helpers.explorers import explore_drift

explore_drift()

# %% [markdown]
# ## Quiz
#
# Click on a choice to see whether it is right, and why. The order of the choices changes each time.

# %% tags=["demo"]
quiz("batchnorm")

# %% tags=["demo"]
progress()

# %% [markdown]
# ## Common mistakes

# %% [markdown]
# ## Takeaways
#
# - `requires_grad=False` stops parameters. BatchNorm's statistics are buffers: every forward pass in train mode moves
#   them.
# - "Frozen" is four things: affine parameters, statistics, normalisation, all. Ask which, and find out by experiment.
# - A freeze has to survive `model.train()`, which every loop calls.
# - Eval mode reads what is stored. If training normalised with the batch and the stored statistics did not follow,
#   training shows one network and you use another.
# - In train mode a small batch means noisy features, and gradient accumulation does not pool statistics.
# - Pool counts, means and squared deviations, in float64. E[x²] - E[x]² loses the digits that matter.
# - New statistics need no labels and few images. They repaired grey paper, noise in part, and inversion not at all.
#   They cost a little where the old ones still fitted. Measure before and after.
#
# Words: [AdaBN](../../docs/glossary.md#adabn), [affine parameters](../../docs/glossary.md#affine-parameters),
# [BatchNorm](../../docs/glossary.md#batchnorm), [biased variance](../../docs/glossary.md#biased-variance),
# [buffer](../../docs/glossary.md#buffer), [drift](../../docs/glossary.md#drift), [eval
# mode](../../docs/glossary.md#eval-mode), [frozen](../../docs/glossary.md#frozen), [gradient
# accumulation](../../docs/glossary.md#gradient-accumulation), [momentum](../../docs/glossary.md#momentum), [running
# statistics](../../docs/glossary.md#running-statistics).
