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
# # 02 · Features
#
# The cheapest way to use a pre-trained network: run it once over your data, keep what comes out, and train a linear
# classifier on that. No gradient ever enters the network, so a laptop does it in seconds.
#
# | | |
# |---|---|
# | you need | chapter 00; no GPU, no network |
# | time | 50 minutes for you, 12 seconds for two CPU cores |
# | exercises | 2 so far: extraction, and the linear probe |
#
# Afterwards you can
#
# - turn any network into a feature extractor that leaves the network untouched,
# - say what "frozen" has to mean, and check it,
# - train a linear probe whose answer does not depend on luck, and put it back on the network as its head.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from grader import check, continue_with, hint, progress
from helpers.backbones import glyphnet
from helpers.data import digits
from helpers.features import remove_head
from helpers.training import accuracy

# %% [markdown]
# ## Letters know something about digits
#
# `glyphnet` was trained on rendered letters; it has never seen a digit. Our task is handwritten digits, with **5 labelled
# examples of each**. What the network computes just before its head (128 numbers per image) was made to tell letters
# apart. Does it tell digits apart?
#
# **Predict before you run.** A linear classifier on the 1,024 raw pixels gets some fraction of 800 test digits right, and
# a linear classifier on the 128 features another. Write down both.

# %% tags=["demo"]
my_prediction = {"raw pixels": None, "features": None}  # two numbers from 0.0 to 1.0

# %%
train = digits("train", labels_per_class=5, draw=0)  # 50 images with labels
test = digits("test")  # 800 images

backbone = glyphnet()
head = remove_head(backbone)  # backbone(images) now gives (n, 128)
print(f"the head that was there: {head}")

# %% tags=["demo"]
fig, axes = plt.subplots(5, 10, figsize=(7, 3.8))
for column in range(10):
    examples = train.inputs[train.labels == column]
    for row in range(5):
        axes[row, column].imshow(examples[row, 0], cmap="gray")
        axes[row, column].axis("off")
fig.suptitle("all the labelled digits there are: 5 of each", fontsize=10)
plt.show()

# %% [markdown]
# ## Exercise 2.1: extract, and leave no trace
#
# **Exercise 2.1** (20 min, ●●○). Write `extract(backbone, images, batch_size)`.
#
# - `backbone` is any `nn.Module` that maps `(n, channels, height, width)` to `(n, width)`. It may hold BatchNorm and
#   dropout, and **each of its modules may be in train or in eval mode when you get it**.
# - `images` has shape `(n, channels, height, width)`. At most `batch_size` of them may be in the backbone at once;
#   `n` need not be a multiple of `batch_size`.
# - Return the features, `(n, width)`, in the order of the images, without a graph. The features of an image depend on
#   that image alone. Later training must accept them, so no inference tensors.
# - Leave the backbone exactly as it was: parameters, buffers, `requires_grad`, and the mode of every module.


# %%
def extract(backbone, images, batch_size):
    ### BEGIN SOLUTION
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            return torch.cat([backbone(batch) for batch in images.split(batch_size)])
    finally:
        for module, training in modes.items():
            module.training = training
    ### END SOLUTION


# %%
check("2.1", extract)

# %% [markdown]
# ### Why all this care?
#
# Below, the same image goes through the network twice, with different company. In train mode a BatchNorm normalises with
# the statistics of the batch, so an image's features depend on its neighbours, and each pass moves the buffers,
# although nothing is trained and no gradient is computed.

# %%
extract = continue_with("2.1")

# %% tags=["demo"]
careless = glyphnet()
remove_head(careless)
careless.train()
before = {name: buffer.clone() for name, buffer in careless.named_buffers()}
with torch.no_grad():  # no gradients, and yet ...
    alone = careless(test.inputs[:8])[0]
    in_company = careless(torch.cat([test.inputs[:1], test.inputs[100:107]]))[0]
moved = [name for name, buffer in careless.named_buffers() if not torch.equal(buffer, before[name])]
difference = (alone - in_company).abs().max() / alone.abs().max()
print(f"largest change of one image's features: {difference:.0%} of the largest feature")
print(f"buffers that moved: {len(moved)} of {len(before)} (the other two are the mean and std of the preprocessing)")

# %% [markdown]
# ## Extract once, use often
#
# With extraction done, the network's work is over. Everything below happens on a table of numbers.

# %%
features = {"train": extract(backbone, train.inputs, 256), "test": extract(backbone, test.inputs, 256)}
pixels = {"train": train.inputs.flatten(1), "test": test.inputs.flatten(1)}
print({name: tuple(table.shape) for name, table in features.items()})

# %% [markdown]
# ## Exercise 2.2: the linear probe
#
# **Exercise 2.2** (25 min, ●●●). Write `linear_probe(features, labels, classes, penalty)`: train and return an
# `nn.Linear(width, classes)` that minimises
#
# $$\frac{1}{n} \sum_{i=1}^{n} \text{cross-entropy}(W f_i + b,\ y_i) \;+\; \frac{\text{penalty}}{2} \sum_{jk} W_{jk}^2$$
#
# - `features` has shape `(n, width)`, `labels` shape `(n,)` with whole numbers from 0 to `classes - 1`.
#   A class may have no example among the labels; the head has an output for it all the same. (Its bias then sinks for
#   ever, slower and slower: also limit the number of steps.)
# - The bias is trained, and not penalised.
# - The objective is convex: every way of minimising it ends at the same head, if it goes on until the gradient has all
#   but vanished. A few hundred steps over all examples at once are enough here. The check trains four times, on
#   at most 40 examples: with most solutions that takes less than a second.


# %%
def linear_probe(features, labels, classes, penalty):
    ### BEGIN SOLUTION
    head = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + penalty / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head
    ### END SOLUTION


# %%
check("2.2", linear_probe)

# %%
linear_probe = continue_with("2.2")

# %% [markdown]
# ## What are the features worth?
#
# Both probes get the same 50 labels and the same choice of penalty. Which penalty is best is decided on 200 validation
# digits, never on the test digits. To see how much is luck, we do it for five draws of 50 labelled digits.

# %%
PENALTIES = (1e-3, 1e-2, 1e-1)
validation = digits("validation")
features["validation"] = extract(backbone, validation.inputs, 256)
pixels["validation"] = validation.inputs.flatten(1)

# %% tags=["demo"]
results = {"raw pixels": [], "features": []}
for draw in range(5):
    few = digits("train", labels_per_class=5, draw=draw)
    tables = {
        "raw pixels": (few.inputs.flatten(1), pixels),
        "features": (extract(backbone, few.inputs, 256), features),
    }
    for name, (table, held_out) in tables.items():
        probes = [linear_probe(table, few.labels, 10, penalty) for penalty in PENALTIES]
        with torch.no_grad():
            best = max(probes, key=lambda probe: accuracy(probe(held_out["validation"]), validation.labels))
            results[name].append(accuracy(best(held_out["test"]), test.labels))


def predicted(name):
    return "(no prediction)" if my_prediction[name] is None else f"you predicted {my_prediction[name]}"


for name, values in results.items():
    values = torch.tensor(values)
    print(f"{name:<10}  {values.mean():.3f} ± {values.std():.3f}   {predicted(name)}")

# %% tags=["demo"]
fig, ax = plt.subplots(figsize=(6, 2.6))
for row, values in enumerate(results.values()):
    ax.plot(values, [row] * len(values), "o", color=f"C{row}", alpha=0.6)
    ax.plot([sum(values) / len(values)] * 2, [row - 0.25, row + 0.25], color=f"C{row}", linewidth=3)
ax.set(yticks=[0, 1], yticklabels=list(results), xlim=(0.5, 1), ylim=(-0.6, 1.6))
ax.set_xlabel("accuracy on 800 test digits (dots: draws of 50 labels; bar: their mean)")
fig.tight_layout()
plt.show()

# %% [markdown]
# The features came from letters only. They are not a digit recogniser, but they hold enough of what strokes look like that
# 50 labels go further than on pixels.
#
# ## Back onto the network
#
# A probe is an `nn.Linear`, and so was the head. Put it in the head's place, and the network names digits.

# %% tags=["demo"]
recogniser = nn.Sequential(backbone, linear_probe(features["train"], train.labels, 10, penalty=1e-2))
shown = test.inputs[:10]
names = extract(recogniser, shown, 256).argmax(dim=1)
fig, axes = plt.subplots(1, 10, figsize=(9, 1.3))
for image, name, label, ax in zip(shown, names, test.labels, axes):
    ax.imshow(image[0], cmap="gray")
    ax.set_title(f"{name}" + ("" if name == label else f", is {label}"), fontsize=9)
    ax.axis("off")
plt.show()

# %% tags=["demo"]
progress()

# %% [markdown]
# ## Common mistakes

# %% [markdown]
# ## Takeaways
#
# - *Frozen* is two things: `requires_grad=False` keeps parameters from training, eval mode keeps buffers from moving and
#   an image's features from depending on its neighbours. Neither does the other's work.
# - Put modes back one by one. `train()` at the end switches on what someone else had switched off.
# - A linear probe is a convex problem: go on until the gradient has vanished, and the answer no longer depends on
#   the optimizer, the start or the seed. So two probes can be compared.
# - Choose the penalty on validation data, and report more than one draw: with 50 labels, luck is visible.
