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
# classifier on that. No gradient enters the network, so a laptop does it in seconds. You do it for images first, then for
# texts.
#
# | | |
# |---|---|
# | you need | chapter 00; no GPU, no network |
# | time | four hours for you, in two parts (2½ and 1½) that stand on their own; 21 seconds for two CPU cores (measured; without a GPU) |
# | exercises | 11: seven on images, four on texts |
#
# Afterwards you can
#
# - take the head off any network, and say where the popular one-liner goes wrong without an error,
# - turn a network into a feature extractor that leaves the network untouched, and keep its features on disk without ever
#   using stale ones,
# - train a linear probe whose answer does not depend on luck,
# - load torchvision's weights with the preprocessing they were trained with,
# - turn texts into vectors that depend on their own text alone,
# - read from a figure how many labels a pre-trained network saves, and where it saves none.
#
# Words in *italics* at their first use are in the [glossary](../../docs/glossary.md).

# %%
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from grader import check, continue_with, hint, progress, quiz

# %% [markdown]
# # Part 1: images
#
# ## Letters know something about digits
#
# `glyphnet` was trained on rendered letters; it has never seen a digit. Our *target task* is handwritten digits, with **5
# labelled examples of each**. What the network computes just before its *head* (128 numbers per image, the *features*) was
# made to tell letters apart. Does it tell digits apart?
#
# **Predict before you run.** Of 800 test digits, what fraction does a linear classifier get right if it sees the 1,024 raw
# pixels, and what fraction if it sees the 128 features? Replace `None` with your numbers.

# %% tags=["demo"]
from helpers.predict import predict

guess = predict(
    raw_pixels=None, features=None
)  # from 0.0 to 1.0; guessing at random gets 0.1

# %% [markdown]
# One variable decides what this chapter runs on. `"embedded"` needs no network. `"hub"` downloads `resnet18` (45 MB) and
# photographs of 37 breeds of cats and dogs (800 MB), once, and the same cells run on those. Or bring your own folder of
# photographs or table of texts: `help(helpers.profiles)`.

# %% tags=["demo"]
import helpers.profiles
from helpers.progress import progress_bar

profile = helpers.profiles.choose("embedded")
backbone = (
    profile.image_backbone()
)  # without its head: backbone(images) gives (n, backbone.width)
train = profile.images("train", labels_per_class=5, draw=0)
validation, test = profile.images("validation"), profile.images("test")
print(
    f"{type(backbone).__name__}, {backbone.width} features, stages "
    f"{', '.join(backbone.stages)}"
)
print(
    f"images: {len(train.labels)} to train on, {len(validation.labels)} to choose on, "
    f"{len(test.labels)} to test on"
)

# %% tags=["demo"]
import matplotlib.pyplot as plt

from helpers.figures import show

shown_classes = min(10, len(train.classes))
fig, axes = plt.subplots(5, shown_classes, figsize=(0.7 * shown_classes, 3.8))
for column, row in (
    (column, row) for column in range(shown_classes) for row in range(5)
):
    picture = train.inputs[5 * column + row]  # class after class
    axes[row, column].imshow(
        picture[0] if isinstance(picture, torch.Tensor) else plt.imread(picture),
        cmap="gray",
    )
    axes[row, column].axis("off")
fig.suptitle(
    f"5 labelled examples of each class ({', '.join(train.classes[:10])})", fontsize=9
)
show(fig, f"Small pictures: five labelled examples of each of {shown_classes} classes.")

# %% [markdown]
# ## Exercise 2.1: take off the head
#
# There are three ways to get at what enters the head: put `nn.Identity` in its place; catch its input with a *hook*; cut the
# graph of the computation there with `torch.fx`, as torchvision's `create_feature_extractor` does. A fourth is short and
# popular: `nn.Sequential(*list(model.children())[:-1])`. One of the four is wrong on some networks, without an error. The
# check has such a network.
#
# **Exercise 2.1** (15 min, ●●○). Write `drop_head`.
#
# *Core*
#
# 1. The result maps inputs to what enters the head, with everything that `forward` does before.
# 2. The name decides: the head may stand inside other modules, and need not be defined last.
# 3. The result can be called again and again, with batches of any size.
# 4. The model keeps its head and still gives its logits.
# 5. The model's modules keep their modes, and its parameters their `requires_grad`.
#
# *Fine print*
#
# 6. Between calls, and after one that raised, no hook or extra layer is left in the model.
# 7. Batches do not pile up in memory.


# %%
def drop_head(model: nn.Module, name: str) -> Callable[[Tensor], Tensor]:
    """What `model` computes before its head.

    >>> model = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(4, 3))
    >>> features = drop_head(model, "2")
    >>> features(torch.tensor([[[-1.0, 2.0], [3.0, -4.0]]]))
    tensor([[0., 2., 3., 0.]])

    Args:
        model: any model. Its last step is its head, an nn.Linear.
        name: the head, as `model.named_modules()` calls it: "fc", "classifier.2".

    Returns:
        A function or a module: inputs -> (n, in_features of the head).
    """

    ### BEGIN SOLUTION
    def features(images):
        caught = []
        hook = model.get_submodule(name).register_forward_pre_hook(
            lambda module, args: caught.append(args[0])
        )
        try:
            model(images)
        finally:
            hook.remove()
        return caught[0]

    return features
    ### END SOLUTION


# %%
check("2.1", drop_head)

# %%
drop_head = continue_with("2.1")

# %% [markdown]
# ### Where the one-liner is wrong
#
# Here are two networks of torchvision, with random weights (the question is about their `forward`, not about what they
# learned). A ResNet applies nothing but its children, so cutting off the last child is harmless. A DenseNet calls `F.relu`
# and a pooling between `features` and `classifier`, in `forward` itself: `children()` does not know about these steps.

# %% tags=["demo"]
from torchvision.models import densenet121, resnet18
from torchvision.models.feature_extraction import create_feature_extractor

photos = torch.rand(4, 3, 64, 64)
for build, name in ((resnet18, "fc"), (densenet121, "classifier")):
    model = build(weights=None).eval()
    with torch.no_grad():
        wanted = drop_head(model, name)(photos)
        graph = create_feature_extractor(model, ["flatten"])(photos)[
            "flatten"
        ]  # both networks flatten before the head
        short = nn.Sequential(*list(model.children())[:-1])(photos)
        short = short.mean((2, 3))  # to the same shape: nothing looks wrong now
    off = [
        (features - wanted).abs().max() / wanted.abs().max()
        for features in (graph, short)
    ]
    print(
        f"{build.__name__:<11} {tuple(wanted.shape)}  difference from yours, in % of "
        "your largest feature: ",
        end="",
    )
    print(f"feature extractor {off[0]:.0%}, one-liner {off[1]:.0%}")

# %% [markdown]
# ## Exercise 2.2a: eval mode for a while
#
# In *eval mode* BatchNorm and dropout do not compute what they compute in training. Each module has its own mode,
# `module.training`. `model.eval()` and `model.train()` switch all modules, so neither brings the old modes back where they
# differed. A *context manager* can. With `@contextmanager`, a function stops at its `yield` while the body of the `with` runs.
#
# **Exercise 2.2a** (15 min, ●●○). Write `eval_mode`.
#
# *Core*
#
# 1. Inside the `with`, every module of `model` is in eval mode.
# 2. After the `with`, each module is in the mode that it had before.
# 3. An exception in the body comes out, and the modes are put back all the same.
#
# *Fine print*
#
# 4. `KeyboardInterrupt` (Ctrl-C) comes out too, and the modes are put back.
# 5. The body may switch modes, and contain another `eval_mode` of the model or of a part.
# 6. A module may stand in two places of the model.
# 7. A module may define its own `train()` or `eval()`.
# 8. Nothing but modes changes; the body computes gradients as before.


# %%
@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the `with`; after it, each module has its old mode again.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4).eval())
    >>> with eval_mode(model):
    ...     [module.training for module in model.modules()]
    [False, False, False]
    >>> [module.training for module in model.modules()]  # the model, dropout, BatchNorm
    [True, True, False]
    """
    ### BEGIN SOLUTION
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
    ### END SOLUTION


# %%
check("2.2a", eval_mode)

# %%
eval_mode = continue_with("2.2a")

# %% [markdown]
# ## Exercise 2.2: extract, and leave no trace
#
# A backbone is *frozen* while neither its parameters nor its *buffers* move. These are two things: training moves
# parameters, and a forward pass in train mode moves buffers. Your `eval_mode` keeps the buffers still, and puts the modes
# back. The rest is about memory: it cannot hold a whole data set, nor the activations that torch keeps for a backward pass.
#
# **Exercise 2.2** (15 min, ●●○). Write `extract`.
#
# *Core*
#
# 1. Each image gives one row, in the order of the images, for any number of images.
# 2. The features of an image depend on that image alone.
# 3. At most `batch_size` images are in the backbone at once.
# 4. The features have no graph, and no graph is kept while later batches run.
# 5. The backbone is left as it was.
#
# *Fine print*
#
# 6. The backbone's modes are put back even if it raises an error.
# 7. Later training accepts the features: they are not *inference tensors*.


# %%
def extract(backbone: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Run `backbone` over `images`, batch by batch; keep nothing but its outputs.

    >>> backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Dropout())
    >>> features = extract(backbone, torch.ones(5, 1, 2, 3), 2)
    >>> features.shape, features.requires_grad
    (torch.Size([5, 6]), False)
    >>> backbone.training, backbone[1].running_mean.any().item()
    (True, False)

    Args:
        backbone: (n, channels, height, width) -> (n, width), in any modes.
        images: (n, channels, height, width), n at least 1.
        batch_size: at least 1. The last batch may be smaller.

    Returns:
        (n, width). Inside `torch.autocast` they are rounded to bfloat16, which is fine.
    """
    ### BEGIN SOLUTION
    with eval_mode(backbone), torch.no_grad():
        return torch.cat([backbone(batch) for batch in images.split(batch_size)])
    ### END SOLUTION


# %%
check("2.2", extract)

# %%
extract = continue_with("2.2")

# %% [markdown]
# ### Why all this care?
#
# Below, the same image goes through the network twice, each time beside other images. In train mode a BatchNorm normalises
# with the statistics of the batch. So an image's features depend on its neighbours, and each pass moves the buffers. Yet
# nothing is trained, and no gradient is computed.

# %% tags=["demo"]
import copy

from helpers.features import take

careless = (
    copy.deepcopy(backbone).requires_grad_(False).train()
)  # "frozen", says requires_grad
before = {name: buffer.clone() for name, buffer in careless.named_buffers()}
with torch.no_grad():  # no gradients, and yet ...
    alone = careless(test.inputs[:8])[0]
    in_company = careless(
        take(test.inputs, torch.tensor([0, *range(100, 107)]), torch.device("cpu"))
    )[0]
moved = [
    name
    for name, buffer in careless.named_buffers()
    if not torch.equal(buffer, before[name])
]
statistics = [name for name in before if "running" in name or "num_batches" in name]
difference = (alone - in_company).abs().max() / alone.abs().max()
print(f"one image's features change by up to {difference:.0%} of the largest feature")
print(
    f"buffers of BatchNorm that moved: {len(set(moved) & set(statistics))} of "
    f"{len(statistics)}"
)

# %% [markdown]
# ## Extract once, use often
#
# With extraction done, the network's work is over. Everything below happens on tables of numbers.

# %% tags=["demo"]
from helpers.recordings.transfer import plain_features

features = {
    name: extract(backbone, part.inputs, 256)
    for name, part in (("validation", validation), ("test", test))
}
print({name: tuple(table.shape) for name, table in features.items()})

# %% [markdown]
# ## Exercise 2.3: the linear probe
#
# A *linear probe* asks what features are worth: a linear head is trained on them, and nothing else. With a *penalty* on its
# weights there is one best head (except for a constant added to all biases, which softmax does not see),
#
# $$\min_{W, b} \; \frac{1}{n} \sum_{i=1}^{n} \text{cross-entropy}(W f_i + b,\ y_i) \;+\; \frac{\text{penalty}}{2} \sum_{jk} W_{jk}^2$$
#
# The objective is convex: every way of minimising it ends there, from any start. So the answer does not depend on luck,
# unless training stops too early.
#
# **Exercise 2.3** (25 min, ●●●). Write `linear_probe`.
#
# *Core*
#
# 1. The loss is the mean cross-entropy over all examples.
# 2. `penalty / 2` times the sum of the squared weights is added to the loss.
# 3. The bias is trained, but not penalised.
# 4. Training goes on until the gradient has almost vanished. Here this takes a few hundred steps, each over all examples.
# 5. The head has one output per class, even for a class without an example.


# %%
def linear_probe(
    features: Tensor, labels: Tensor, classes: int, penalty: float
) -> nn.Linear:
    """The head that minimises the mean cross-entropy + penalty / 2 * sum of W squared.

    >>> features = torch.tensor([[-1.0], [1.0], [1.0]])
    >>> head = linear_probe(features, torch.tensor([0, 1, 1]), classes=2, penalty=0.5)
    >>> [round(weight, 3) for weight in head.weight.flatten().tolist()]
    [-0.498, 0.498]
    >>> round(head(features).softmax(1)[:, 1].mean().item(), 3)  # two of three labels
    0.667

    Args:
        features: (n, width).
        labels: (n,), whole numbers from 0 to classes - 1.
        classes: how many. The bias of a class without examples falls for ever, slower
            and slower: so limit the number of steps, too.
        penalty: above 0.

    Returns:
        An nn.Linear(width, classes), on the device of the features.
    """
    ### BEGIN SOLUTION
    head = nn.Linear(features.shape[1], classes, device=features.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(
        head.parameters(),
        max_iter=500,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels)
        loss = loss + penalty / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head
    ### END SOLUTION


# %%
check("2.3", linear_probe)  # trains several times: up to some seconds

# %%
linear_probe = continue_with("2.3")

# %% [markdown]
# ### What are the features worth?
#
# Both classifiers get the same labels and the same three penalties. The best penalty is chosen on *validation examples*,
# never on test examples. Five *draws* of labelled images show how much is luck. Several numbers of labels show how the gain
# depends on them.

# %% tags=["demo"]
from itertools import product

from helpers.training import accuracy, one_thread


def score(table, labels, tables, classes):
    """Test accuracy of a probe, its penalty chosen on validation."""
    with (
        one_thread()
    ):  # on tables this small, two threads would only wait for each other
        probes = [
            linear_probe(table, labels, classes, penalty)
            for penalty in (1e-3, 1e-2, 1e-1)
        ]
    with torch.no_grad():
        best = max(
            probes,
            key=lambda probe: accuracy(
                probe(tables["validation"]), tables["validation labels"]
            ),
        )
        return accuracy(best(tables["test"]), tables["test labels"])


labels = {"validation labels": validation.labels, "test labels": test.labels}
curves = {
    name: {number: [] for number in (1, 2, 5, 10)} for name in ("raw pixels", "probe")
}
for number, draw in progress_bar(list(product((1, 2, 5, 10), range(5))), "probing"):
    few = profile.images("train", labels_per_class=number, draw=draw)
    table = extract(backbone, few.inputs, 256)
    curves["probe"][number].append(
        score(table, few.labels, features | labels, len(few.classes))
    )
    if isinstance(few.inputs, torch.Tensor):
        own, *others = plain_features(few.inputs, validation.inputs, test.inputs)
        others = dict(zip(("validation", "test"), others))
        curves["raw pixels"][number].append(
            score(own, few.labels, others | labels, len(few.classes))
        )
curves = {
    name: values for name, values in curves.items() if values[5]
}  # photographs differ in size: no raw pixels
guess.beside(
    {
        "raw_pixels": curves.get("raw pixels", curves["probe"])[5],
        "features": curves["probe"][5],
    }
)

# %% [markdown]
# **Predict again.** There are two more ways to use the same labels: train the same network from scratch, or go on training
# all its layers from the pre-trained weights (*fine-tuning*). At 5 labels per class, how much better than the probe is
# fine-tuning? And at 1? How many times longer does it take?

# %% tags=["demo"]
gain = predict(
    at_1=None, at_5=None
)  # accuracy of fine-tuning minus the probe's: -0.1 if it loses 0.1
cost = predict(times_longer=None)

# %% [markdown]
# The next cell measures how long one number of the probe's curve takes, and a tenth of one fine-tuning run. The two new
# curves are recorded. `helpers.recordings.transfer` measured them with the same labels and three learning rates, the best
# chosen on the same validation digits: 300 steps, five draws.

# %% tags=["demo"]
from helpers.training import fit

started = time.perf_counter()
score(
    extract(backbone, train.inputs, 256),
    train.labels,
    features | labels,
    len(train.classes),
)
probe_seconds = time.perf_counter() - started
model = nn.Sequential(
    copy.deepcopy(backbone), nn.Linear(backbone.width, len(train.classes))
)
history = fit(model, train, steps=30, lr=3e-3, batch_size=32)
tuning_seconds = 3 * 10 * history.seconds  # three learning rates, 300 steps each
print(f"probe {probe_seconds:.2f} s, fine-tuning about {tuning_seconds:.0f} s")
cost.beside({"times_longer": tuning_seconds / probe_seconds})

# %% tags=["demo"]
from helpers.figures import accuracy_figure
from helpers.recordings.transfer import recorded

kept = recorded("digits")
shown = dict(curves)
if backbone.width == 128:  # the record is of glyphnet
    for way in ("from scratch", "fine-tuned"):
        shown[f"{way} (recorded)"] = {number: kept[number][way] for number in kept}
show(*accuracy_figure(shown, "images per class", chance=1 / len(train.classes)))
gains = {
    f"at_{number}": [
        tuned - probe
        for tuned, probe in zip(kept[number]["fine-tuned"], kept[number]["probe"])
    ]
    for number in (1, 5)
}
gain.beside(gains)

# %% [markdown]
# Read the figure across: take the accuracy that raw pixels reach with 10 labels per class, and look how many labels the
# probe needs for it. Then look at the left end: with one label per class, fine-tuning all layers ends below the probe. It
# has the same labels, but it has to set hundreds of thousands of weights with them. From 5 labels on it wins, by a little.
# A pre-trained network does save labels; more training does not always help.
#
# ## Exercise 2.4a: a name for a result
#
# Extraction is expensive, so keep its result in a file. But after an epoch of fine-tuning, or with one more image, the file
# is out of date, and still loads. So name it by a key, made of all that features depend on, and nothing else.
#
# **Exercise 2.4a** (20 min, ●●○). Write `cache_key`.
#
# *Core*
#
# 1. Equal contents give equal keys: for copies, frozen or not, in either mode; for settings in another order; in the next
#    kernel.
# 2. The key changes if one number of a parameter or buffer changes, or two change places.
# 3. The key changes with one pixel, a missing image, or another order of the images.
# 4. The key changes with a setting's name or value, to the last digit.
# 5. The key can be a file name: 1 to 200 letters, digits, `-` and `_`.
#
# *Fine print*
#
# 6. Buffers that `state_dict()` leaves out count, too.
# 7. Equal bytes in another shape or dtype give another key.
# 8. How the images lie in memory makes no difference.


# %%
def cache_key(backbone: nn.Module, images: Tensor, settings: dict[str, float]) -> str:
    """A name for what `backbone` makes of `images` with `settings`.

    >>> backbone, images = nn.Linear(2, 3), torch.zeros(4, 2)
    >>> key = cache_key(backbone, images, {"mean": 0.5, "size": 8})
    >>> cache_key(backbone, images.clone(), {"size": 8, "mean": 0.5}) == key
    True
    >>> cache_key(backbone, images, {"mean": 0.25, "size": 8}) == key
    False

    Args:
        backbone: parameters and buffers, those registered with `persistent=False` too,
            in float32 or whole numbers.
        images: (n, ...), n at least 1. A slice has the key of its copy.
        settings: names and numbers, such as {"mean": 0.1307, "size": 8}; may be empty.
    """
    ### BEGIN SOLUTION
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in [
        *backbone.named_parameters(),
        *backbone.named_buffers(),
        ("", images),
    ]:
        key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        key.update(tensor.detach().cpu().numpy().tobytes())
    return key.hexdigest()
    ### END SOLUTION


# %%
check("2.4a", cache_key)

# %%
cache_key = continue_with("2.4a")

# %% [markdown]
# ## Exercise 2.4: a cache that notices
#
# The key says what belongs together. What is left is the files: when to read one, when to compute, and what to do with a
# file that a full disk has cut short.
#
# **Exercise 2.4** (20 min, ●●●). Write `cached_features`.
#
# *Core*
#
# 1. A result that was computed once is read from a file, also for equal copies and in the next kernel; `compute` does not
#    run again.
# 2. For other weights, images or settings `compute` runs. Old results stay: going back to an earlier backbone computes
#    nothing.
# 3. Only `folder` remembers: in an emptied folder, or in another one, everything is computed again.
#
# *Fine print*
#
# 4. A file that is empty or cut short counts as missing, and is replaced.
# 5. If `compute` raises, so does the call, and nothing is left that a later call takes for a result.
# 6. Settings in another order are the same settings. Settings that differ in their last digit are not.
# 7. Images with equal bytes but another shape are other images.


# %%
def cached_features(
    folder: Path,
    compute: Callable[..., Tensor],
    backbone: nn.Module,
    images: Tensor,
    settings: dict[str, float],
) -> Tensor:
    """What `compute(backbone, images, **settings)` returns, computed at most once.

    >>> from pathlib import Path; from tempfile import mkdtemp
    >>> folder = Path(mkdtemp())
    >>> def compute(backbone, images, size):
    ...     print("computing")
    ...     return backbone(images[:, :size])
    >>> backbone, images = nn.Flatten(), torch.ones(4, 2)
    >>> first = cached_features(folder, compute, backbone, images, {"size": 1})
    computing
    >>> cached_features(folder, compute, backbone, images, {"size": 1}).shape
    torch.Size([4, 1])

    Args:
        folder: exists. Names, format and sub-folders of the files are up to you.
        compute: a function such as `extract`, the same in all calls with this folder.
        backbone: as for `cache_key`.
        images: as for `cache_key`.
        settings: as for `cache_key`; what `compute` is called with.

    Returns:
        (n, width), the features, float32.
    """
    ### BEGIN SOLUTION
    path = folder / f"{cache_key(backbone, images, settings)}.pt"
    with suppress(
        Exception
    ):  # missing or cut short: either way there is nothing to read
        return torch.load(path)
    features = compute(backbone, images, **settings)
    draft = path.with_suffix(".part")
    torch.save(features, draft)
    draft.replace(path)  # under its own name only when it is whole
    return features
    ### END SOLUTION


# %%
check("2.4", cached_features)

# %%
cached_features = continue_with("2.4")

# %% tags=["demo"]
import tempfile

if isinstance(test.inputs, torch.Tensor):
    folder = Path(tempfile.mkdtemp())
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        cached_features(folder, extract, backbone, test.inputs, {"batch_size": 256})
        seconds.append(time.perf_counter() - started)
    print(
        f"{len(test.labels)} images: computed in {seconds[0]:.3f} s, from the file in "
        f"{seconds[1]:.3f} s"
    )
    print(
        f"on disk: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB"
    )

# %% [markdown]
# For a network of 0.3 million parameters that is a small gain. It grows with the network: the key costs one pass over
# weights and data, the features cost a pass through the network. `helpers.features.cached_features` does the same for lists
# of texts and files, and also notices a file whose bytes were changed.
#
# ## Exercise 2.5: weights that know what they want
#
# In torchvision, a network is code and its weights are an entry of a *weights enum*. The entry knows the file, the
# *preprocessing* (`weights.transforms()`), the names of the outputs (`weights.meta["categories"]`) and where the numbers
# come from. It replaced `pretrained=True` in version 0.13, because one architecture can have several sets of weights, and
# they may want different inputs:

# %% tags=["demo"]
from torchvision.models import ResNet18_Weights, ResNet50_Weights

for weights in (
    ResNet18_Weights.IMAGENET1K_V1,
    ResNet50_Weights.IMAGENET1K_V1,
    ResNet50_Weights.IMAGENET1K_V2,
):
    wants, meta = weights.transforms(), weights.meta
    million, names = meta["num_params"] / 1e6, len(meta["categories"])
    print(
        f"{weights!s:<31} {million:4.1f} M parameters, {names} categories, "
        f"{wants.resize_size[0]} -> {wants.crop_size[0]} pixels"
    )

# %% [markdown]
# Two sets of weights for one ResNet-50, of equal shape: one wants the shorter side at 256 pixels before the crop, the other
# at 232. Here is what each of them sees of a photograph that comes with scikit-learn.

# %% tags=["demo"]
from sklearn.datasets import load_sample_image

photo = torch.from_numpy(load_sample_image("flower.jpg").copy()).movedim(
    -1, 0
)  # (3, 427, 640), uint8
seen = {"the photograph": photo.movedim(0, -1)}
for weights in (ResNet50_Weights.IMAGENET1K_V1, ResNet50_Weights.IMAGENET1K_V2):
    ready = weights.transforms()(photo)
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (weights.transforms().mean, weights.transforms().std)
    )
    values = f"from {ready.min():.1f} to {ready.max():.1f}"
    title = f"{weights.name}\n{tuple(ready.shape)}, {values}"
    seen[title] = (ready * std + mean).movedim(0, -1)
fig, axes = plt.subplots(
    1, 3, figsize=(8, 2.6), width_ratios=(1.5, 1, 1), layout="constrained"
)
for ax, (title, picture) in zip(axes, seen.items()):
    ax.imshow(picture.clamp(0, 1) if picture.is_floating_point() else picture)
    ax.set_title(title, fontsize=9)
    ax.axis("off")
show(
    fig,
    "A flower, 640 by 427 pixels, and the two 224 by 224 crops that two sets of "
    "weights of ResNet-50 make of it; "
    "the second shows a little more.",
)

# %%
from torchvision.models import WeightsEnum

# %% [markdown]
# So let the weights say what to do. A network also answers if an image was prepared in another way, but it was not trained
# on such images.
#
# **Exercise 2.5** (20 min, ●●○). Write `classify`: what a network sees in photographs, in words.
#
# *Core*
#
# 1. Each image goes through `weights.transforms()` as it is, with no other step before or after.
# 2. The name of an output is at its index in `weights.meta["categories"]`.
# 3. Each image, in the order given, gets `k` pairs `(category, probability)`, the likeliest first.
# 4. The probabilities are the softmax over all categories, however many are listed. They are not rounded.
# 5. The network runs in eval mode: the answer for an image depends on that image alone.
#
# *Fine print*
#
# 6. Afterwards the model is what it was: its buffers, hooks, `requires_grad`, the mode of each module.


# %%
def classify(
    weights: WeightsEnum,
    model: nn.Module,
    images: list[Tensor],
    k: int,
) -> list[list[tuple[str, float]]]:
    """The `k` likeliest categories of each image, with their probabilities.

    A network that gives the same outputs for every image, 0.0 to 999.0:

    >>> from torchvision.models import ResNet18_Weights
    >>> head, bias = nn.Linear(3, 1000), torch.arange(1000.0)
    >>> _ = head.load_state_dict({"weight": torch.zeros(1000, 3), "bias": bias})
    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    >>> photo = torch.zeros(3, 40, 60, dtype=torch.uint8)
    >>> [pairs] = classify(ResNet18_Weights.IMAGENET1K_V1, model, [photo], k=2)
    >>> [(category, round(probability, 3)) for category, probability in pairs]
    [('toilet tissue', 0.632), ('ear', 0.233)]

    Args:
        weights: a member of a weights enum.
        model: its network, head included, (n, 3, height, width) to logits
            (n, categories); some modules may be in train mode.
        images: n tensors (3, height, width) of uint8, of different sizes.
        k: from 1 to the number of categories.

    Returns:
        A list of n lists of k pairs.
    """
    ### BEGIN SOLUTION
    transforms, categories = weights.transforms(), weights.meta["categories"]
    with eval_mode(model), torch.no_grad():
        logits = model(torch.stack([transforms(image) for image in images]))
    answers = []
    for row in logits.softmax(dim=1):
        best = row.argsort(descending=True)[:k]
        answers.append(
            [(categories[column], row[column].item()) for column in best.tolist()]
        )
    return answers
    ### END SOLUTION


# %%
check("2.5", classify)

# %%
classify = continue_with("2.5")

# %% [markdown]
# On real weights, if they are here or can be had (45 MB): what does ResNet-18 see in scikit-learn's two photographs?

# %% tags=["demo"]
from helpers import hub

weights = ResNet18_Weights.IMAGENET1K_V1
if profile is helpers.profiles.PROFILES["hub"]:
    photos = [
        torch.from_numpy(load_sample_image(name).copy()).movedim(-1, 0)
        for name in ("flower.jpg", "china.jpg")
    ]
    for answer in classify(weights, hub.torchvision_model(weights), photos, 3):
        print(", ".join(f"{name} {probability:.2f}" for name, probability in answer))
else:
    print(f'to download {weights} and see its answers, choose the profile "hub" above')

# %% [markdown]
# # Part 2: texts
#
# The plan is the same. Now the inputs are texts, and the network is an encoder that was trained on pairs of sentences. The
# task: to which of six topics does a docstring belong? The texts are first paragraphs of docstrings of Python's standard
# library, read from the Python that runs this notebook.
#
# Has the encoder seen this before? Not the topics. But its model card lists `code_search_net`, 1,151,414 pairs of code and
# docstring, among the data that it learned from, so the language of docstrings is familiar to it. What follows shows what
# features are worth near home. On texts of a kind that the encoder has never met, expect less.

# %% tags=["demo"]
splits = progress_bar(("train", "validation", "test"), "reading")
train_texts, validation_texts, test_texts = (profile.texts(split) for split in splits)
for topic in range(len(test_texts.classes)):
    example = test_texts.inputs[(test_texts.labels == topic).nonzero()[0, 0]]
    print(f"{test_texts.classes[topic]:<22} {example[:90]}")
counts = [len(part.inputs) for part in (train_texts, validation_texts, test_texts)]
print("texts: {} to train on, {} to choose on, {} to test on".format(*counts))

# %% [markdown]
# **Predict before you run.** With 20 labelled texts per topic, what fraction of 360 test texts does a linear classifier get
# right on word counts (*TF-IDF*), and what fraction on the features of the encoder?

# %% tags=["demo"]
guess_texts = predict(tf_idf=None, features=None)  # guessing at random gets 0.17

# %% [markdown]
# ## Exercise 2.6: from texts to numbers
#
# An encoder sees *tokens*: pieces of words (*WordPiece*), each with a number. Shorter texts of a batch are filled up with
# *padding*, and an *attention mask* says which tokens are real. A tokenizer does all of this, and belongs to the weights,
# as the transforms did.
#
# **Exercise 2.6** (25 min, ●●○). Write `tokenize`.
#
# *Core*
#
# 1. Texts are lowercased and split at white space, of any kind and amount.
# 2. A word becomes the longest piece it begins with, then the longest piece its rest begins with (looked up with `##`
#    before it), and so on.
# 3. If no piece fits the rest, the whole word is one `[UNK]`: no piece is exchanged for a shorter one.
# 4. A text becomes `[CLS]`, its pieces, `[SEP]`: at most `max_length` tokens, by leaving out last pieces.
# 5. Shorter texts get `[PAD]` at the end, up to the longest of the batch. The mask is 1 on tokens, 0 on padding.
#
# *Fine print*
#
# 6. Punctuation, digits and accents are treated like letters.


# %%
def tokenize(
    vocabulary: dict[str, int],
    texts: list[str],
    max_length: int,
) -> dict[str, Tensor]:
    """One batch of numbered pieces, and its mask.

    >>> pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "pad", "##ding"]
    >>> vocabulary = {piece: number for number, piece in enumerate(pieces)}
    >>> batch = tokenize(vocabulary, ["A padding", "a"], max_length=8)
    >>> batch["input_ids"].tolist()
    [[2, 4, 5, 6, 3], [2, 4, 3, 0, 0]]
    >>> batch["attention_mask"].tolist()
    [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]

    Args:
        vocabulary: from piece to number. [PAD], [UNK], [CLS] and [SEP] are among the
            pieces, under any numbers: 0 may be the number of a word.
        texts: n texts, n at least 1; a text may be empty.
        max_length: at least 2.

    Returns:
        {"input_ids": ..., "attention_mask": ...}, each (n, tokens) of int64.
    """

    ### BEGIN SOLUTION
    def cut(word):
        pieces = []
        while word:
            mark = "##" if pieces else ""
            lengths = [
                n for n in range(1, len(word) + 1) if mark + word[:n] in vocabulary
            ]
            if not lengths:
                return ["[UNK]"]
            pieces.append(mark + word[: lengths[-1]])
            word = word[lengths[-1] :]
        return pieces

    rows = []
    for text in texts:
        pieces = [piece for word in text.lower().split() for piece in cut(word)]
        row = ["[CLS]", *pieces[: max_length - 2], "[SEP]"]
        rows.append(torch.tensor([vocabulary[piece] for piece in row]))
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=vocabulary["[PAD]"]),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
    }
    ### END SOLUTION


# %%
check("2.6", tokenize)

# %%
tokenize = continue_with("2.6")

# %% [markdown]
# ### Beside the real one
#
# Hugging Face has a tokenizer for every model: `AutoTokenizer.from_pretrained(name)` loads it, and
# `tokenizer(texts, padding=True, truncation=True, return_tensors="pt")` gives what `AutoModel.from_pretrained(name)` takes.
# `text_backbone` has loaded both for `all-MiniLM-L6-v2`, from a package in place of the Hub. The real tokenizer also splits
# off punctuation and accents before it looks for pieces. With spaces around punctuation, yours should give the same
# numbers.

# %% tags=["demo"]
import re

encoder = profile.text_backbone(max_length=32)  # a tokenizer, an encoder, mean pooling
vocabulary, network = encoder.tokenizer.get_vocab(), encoder.encoder.model
million = sum(parameter.numel() for parameter in network.parameters()) / 1e6
print(
    f"{type(encoder.tokenizer).__name__} with {len(vocabulary)} pieces, "
    f"{type(network).__name__} with {million:.1f} M parameters"
)
spaced = [re.sub(r"([^\w\s]|_)", r" \1 ", text) for text in test_texts.inputs]
print(
    "  ".join(
        encoder.tokenizer.convert_ids_to_tokens(
            tokenize(vocabulary, spaced[:1], 32)["input_ids"][0]
        )
    )
)
same = [
    torch.equal(
        tokenize(vocabulary, [ours], 32)["input_ids"],
        encoder.preprocess([text])["input_ids"],
    )
    for ours, text in zip(spaced, test_texts.inputs)
]
print(f"the same numbers as the real tokenizer: {sum(same)} of {len(same)} texts")

# %% [markdown]
# ## Exercise 2.7: a mean that leaves padding out
#
# An encoder turns a batch of tokens into *hidden states*: a vector for each token, and for each place of padding too.
# *Mean pooling* makes one vector per text, the mean over its own tokens. If padding takes part, a text's vector depends
# on how long the other texts of its batch are.
#
# **Exercise 2.7** (10 min, ●○○). Write `mean_pool`.
#
# *Core*
#
# 1. Row i is the mean of text i's hidden states over its own tokens. Each of these tokens counts the same, the first and
#    the last, too.
# 2. Values at padding change nothing, even if they are infinite or NaN.
#
# *Fine print*
#
# 3. A text without tokens gives zeros.


# %%
def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean of each text's hidden states over its own tokens.

    >>> hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [9.0, 9.0]]])
    >>> mean_pool(hidden, torch.tensor([[1, 1, 0]]))
    tensor([[2., 4.]])

    Args:
        hidden: (n, tokens, width).
        attention_mask: (n, tokens) of int64, 1 on a text's tokens, 0 on the padding
            after them.

    Returns:
        (n, width).
    """
    ### BEGIN SOLUTION
    mask = attention_mask.bool().unsqueeze(-1)
    total = torch.where(mask, hidden, 0).sum(dim=1)
    return total / mask.sum(dim=1).clamp(min=1)
    ### END SOLUTION


# %%
check("2.7", mean_pool)

# %%
mean_pool = continue_with("2.7")

# %% [markdown]
# ### What padding does to a mean
#
# Take one short text, alone and in a batch with a long one. The encoder gets the mask both times. How much of the
# difference is left when the pooling uses it, too?

# %% tags=["demo"]
short, long = min(test_texts.inputs, key=len), max(test_texts.inputs, key=len)
vectors = {}
with torch.no_grad():
    encoder.eval()
    for company in ([short], [short, long]):
        batch = encoder.preprocess(company)
        hidden = encoder.encoder(**batch)
        vectors[len(company)] = {
            "plain mean": hidden.mean(1)[0],
            "mean_pool": mean_pool(hidden, batch["attention_mask"])[0],
        }
for name in ("plain mean", "mean_pool"):
    cosine = F.cosine_similarity(vectors[1][name], vectors[2][name], dim=0)
    print(f"{name:<11} alone and beside the long text: cosine similarity {cosine:.4f}")

# %% [markdown]
# ## Exercise 2.8a: short texts with short ones
#
# In a batch, every text is padded to the longest, and padding costs the encoder as much time as words do. Batches of texts
# of similar length waste little. But then the rows do not come out in the order of the texts, and must be put back. Where a
# row came from and where it has to go are two *permutations*; they are the same only for some orders.
#
# **Exercise 2.8a** (15 min, ●●○). Write `batches_by_length`.
#
# *Core*
#
# 1. Each index from 0 to n - 1 is in one batch, once.
# 2. No batch holds more than `batch_size` indices, and there are as few batches as that allows.
# 3. The texts of a batch follow one another when all texts are sorted by length.
# 4. `back` puts rows back in order: `torch.cat([x[part] for part in batches])[back]` is `x` again.


# %%
def batches_by_length(lengths: Tensor, batch_size: int) -> tuple[list[Tensor], Tensor]:
    """Batches of indices, for texts of similar length, and the way back.

    >>> batches, back = batches_by_length(torch.tensor([5, 2, 9, 4]), batch_size=3)
    >>> [part.tolist() for part in batches]
    [[1, 3, 0], [2]]
    >>> back.tolist()
    [2, 0, 3, 1]

    Args:
        lengths: tokens of each text, (n,) of int64, n at least 1; some may be equal.
        batch_size: at least 1.

    Returns:
        batches: a list or a tuple of tensors of int64, in any order.
        back: (n,) of int64.
    """
    ### BEGIN SOLUTION
    order = lengths.argsort()
    return list(order.split(batch_size)), order.argsort()
    ### END SOLUTION


# %%
check("2.8a", batches_by_length)

# %%
batches_by_length = continue_with("2.8a")

# %% [markdown]
# ## Exercise 2.8: embeddings, whatever the company
#
# Now go the whole way, for many texts. An *embedding* stands for its text, so it must not depend on what else is in the
# batch. As a *unit vector* it is easy to compare: the dot product of two is the cosine of the angle between them.
#
# **Exercise 2.8** (25 min, ●●●). Write `embed` with `batches_by_length`, `mean_pool` and `eval_mode`.
#
# *Core*
#
# 1. Row i points along the mean of the hidden states over all tokens of text i.
# 2. Each row is a unit vector.
# 3. A row depends on its own text alone, whatever other texts are there. Dropout is off.
# 4. At most `batch_size` texts are in the encoder at once.
# 5. There is no more padding than in batches sorted by length. One text at a time is allowed, too.
#
# *Fine print*
#
# 6. The rows have no graph, and are not inference tensors.
# 7. The encoder is left as it was, each of its modules in the mode that it had.


# %%
def embed(
    encoder: nn.Module,
    tokenizer: Callable[[list[str]], dict[str, Tensor]],
    texts: list[str],
    batch_size: int,
) -> Tensor:
    """Unit vectors for texts.

    >>> from helpers.backbones import text_backbone
    >>> minilm = text_backbone()
    >>> rows = embed(minilm.encoder, minilm.preprocess, ["a b", "a", "b a"], 2)
    >>> rows.shape, rows.norm(dim=1).round(decimals=3)
    (torch.Size([3, 384]), tensor([1., 1., 1.]))

    Args:
        encoder: called as encoder(input_ids, attention_mask), it gives hidden states,
            (n, tokens, width). It may be in train mode, in part or as a whole, and on
            a GPU. In `torch.autocast` it works in bfloat16.
        tokenizer: called with a list of texts, it gives {"input_ids",
            "attention_mask"}, each (n, tokens), on the CPU, padded at the end to the
            longest of these texts.
        texts: n texts, n at least 1.
        batch_size: at least 1.

    Returns:
        (n, width), on any device.
    """
    ### BEGIN SOLUTION
    lengths = tokenizer(texts)["attention_mask"].sum(dim=1)
    batches, back = batches_by_length(lengths, batch_size)
    device, rows = next(encoder.parameters()).device, []
    with eval_mode(encoder), torch.no_grad():
        for part in batches:
            batch = tokenizer([texts[i] for i in part])
            ids, mask = (
                batch[name].to(device) for name in ("input_ids", "attention_mask")
            )
            rows.append(mean_pool(encoder(ids, mask), mask))
    return F.normalize(torch.cat(rows)[back], dim=1)
    ### END SOLUTION


# %%
check("2.8", embed)

# %%
embed = continue_with("2.8")

# %% tags=["demo"]
started = time.perf_counter()
texts = [*train_texts.inputs, *validation_texts.inputs, *test_texts.inputs]
parts = [
    embed(encoder.encoder, encoder.preprocess, texts[start : start + 256], 64)
    for start in progress_bar(range(0, len(texts), 256), "embedding")
]
embeddings = dict(zip(("train", "validation", "test"), torch.cat(parts).split(counts)))
print(f"{len(texts)} texts in {time.perf_counter() - started:.1f} s")

# %% [markdown]
# The dot product of two unit vectors is the cosine of the angle between them. Which training texts are nearest to a test
# text? This uses no label and no training.

# %% tags=["demo"]
for row in [int(share * len(test_texts.inputs)) for share in (0, 0.56, 0.92)]:
    similarity = embeddings["train"] @ embeddings["test"][row]
    print(f"{test_texts.inputs[row][:100]}")
    for near in similarity.topk(2).indices.tolist():
        print(f"    {similarity[near]:.2f}  {train_texts.inputs[near][:90]}")

# %% [markdown]
# ## How many labels does it save here?

# %% tags=["demo"]
text_curves = {
    name: {number: [] for number in (2, 5, 10, 20, 50)} for name in ("TF-IDF", "probe")
}
row_of = {
    text: row for row, text in enumerate(train_texts.inputs)
}  # each is embedded already
text_labels = {
    "validation labels": validation_texts.labels,
    "test labels": test_texts.labels,
}
for number, draw in progress_bar(
    list(product(text_curves["probe"], range(3))), "probing"
):
    few = profile.texts("train", labels_per_class=number, draw=draw)
    table = embeddings["train"][[row_of[text] for text in few.inputs]]
    text_curves["probe"][number].append(
        score(table, few.labels, embeddings | text_labels, len(few.classes))
    )
    own, *others = plain_features(
        few.inputs, validation_texts.inputs, test_texts.inputs
    )
    others = dict(zip(("validation", "test"), others))
    text_curves["TF-IDF"][number].append(
        score(own, few.labels, others | text_labels, len(few.classes))
    )
guess_texts.beside(
    {"tf_idf": text_curves["TF-IDF"][20], "features": text_curves["probe"][20]}
)

# %% tags=["demo"]
kept = recorded("docstrings")
shown = dict(text_curves)
for way in ("from scratch", "fine-tuned"):
    shown[f"{way} (recorded)"] = {number: kept[number][way] for number in kept}
show(*accuracy_figure(shown, "texts per topic", chance=1 / len(test_texts.classes)))
for number in (5, 50):
    known = set(
        " ".join(profile.texts("train", labels_per_class=number).inputs).lower().split()
    )
    words = " ".join(test_texts.inputs).lower().split()
    unknown = sum(word not in known for word in words) / len(words)
    print(
        f"with {number} labelled texts per topic, {unknown:.0%} of the words of the "
        "test texts are in none of them"
    )

# %% [markdown]
# Word counts know nothing about a word that is in no labelled text. The encoder has a vector for each word: with 5 labels
# per topic the probe is ahead of TF-IDF with 50. Training the same encoder from scratch on so few texts is worse than
# counting words. And fine-tuning all of its millions of weights is ahead of the probe by less than the spread between
# draws: with so few labels nobody can say that it helps.
#
# (Both ways to train the encoder had 60 steps of 16 texts and the best of three learning rates, the probe the best of three
# penalties.)
#
# ### A split that flatters
#
# Training, validation and test texts come from different modules. Had we split the same texts at random, many of a module's
# near-copies (`Return True if ...`) would be on both sides: a *leak*. What would we have reported?

# %% tags=["demo"]
everything = torch.cat(list(embeddings.values()))
topics = torch.cat([train_texts.labels, validation_texts.labels, test_texts.labels])
at_random = []
for draw in range(3):
    order = torch.randperm(len(topics), generator=torch.Generator().manual_seed(draw))
    held_out, pool = order[: len(test_texts.labels)], order[len(test_texts.labels) :]
    rows = torch.cat(
        [pool[topics[pool] == topic][:50] for topic in range(len(test_texts.classes))]
    )
    with one_thread():
        probe = linear_probe(
            everything[rows], topics[rows], len(test_texts.classes), 1e-3
        )
    with torch.no_grad():
        at_random.append(accuracy(probe(everything[held_out]), topics[held_out]))
split_by = {"by module": text_curves["probe"][50], "at random": at_random}
for name, values in split_by.items():
    values = torch.tensor(values)
    print(f"split {name:<10} {values.mean():.3f} ± {values.std():.3f}")

# %% [markdown]
# The same texts, the same encoder, 50 labels per topic. The higher number answers another question: how well are texts
# recognised if their neighbours were labelled? If new texts will come from new modules, the lower number is the true one.
#
# # At the end
#
# ## Turn the knobs
#
# Here are all recorded results of both tasks. Choose a task, a number of labels, and the strategies to see.

# %% tags=["demo"]
from helpers.explorers import explore_transfer

explore_transfer()

# %% [markdown]
# ## Quiz
#
# Click on a choice to see whether it is right, and why. The order of the choices changes each time.

# %% tags=["demo"]
quiz("features")

# %% tags=["demo"]
progress()

# %% [markdown]
# ## Common mistakes

# %% [markdown]
# ## Takeaways
#
# - Frozen is two things: `requires_grad=False` keeps parameters from training, eval mode keeps buffers from moving and an
#   image's features from depending on its neighbours. Neither does the other's work.
# - Put modes back one by one. `train()` at the end switches on what someone else had switched off.
# - `children()` lists modules, not what `forward` does between them. Replace the head, hook it, or cut the graph.
# - A linear probe is a convex problem: go on until the gradient has vanished, and what it answers no longer depends on
#   the optimizer, the start or the seed. So two probes can be compared.
# - The key of a cache entry is everything the result depends on: weights with buffers, preprocessing, data.
# - Preprocessing belongs to the weights. Ask them: `weights.transforms()`.
# - A text's vector must not depend on its batch: give the mask both to the encoder and to the pooling.
# - Choose settings on validation data, report several draws, and split so that near-copies stay on one side.
#
# Words: [backbone](../../docs/glossary.md#backbone), [buffer](../../docs/glossary.md#buffer),
# [feature](../../docs/glossary.md#feature), [frozen](../../docs/glossary.md#frozen), [head](../../docs/glossary.md#head),
# [linear probe](../../docs/glossary.md#linear-probe), [weights enum](../../docs/glossary.md#weights-enum),
# [attention mask](../../docs/glossary.md#attention-mask), [mean pooling](../../docs/glossary.md#mean-pooling),
# [embedding](../../docs/glossary.md#embedding), [leak](../../docs/glossary.md#leak).
