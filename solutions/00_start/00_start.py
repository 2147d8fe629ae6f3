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
# # 00 · Start
#
# In ten minutes you will have run a pre-trained network, written your first function, and seen what the grader says when a
# function is wrong.
#
# | | |
# |---|---|
# | you need | a little Python and torch; no GPU, no network |
# | time | 10 minutes for you, 3 seconds for two CPU cores |
# | exercises | 1 |
#
# **How a chapter works.** You read, predict, run, and write. An exercise is a cell with `raise NotImplementedError`:
# replace that line with your code, run the cell, then run the check below it. A check tries your function on inputs that it
# draws itself, and says what it saw: "passed", "not yet" with the idea that seems to be missing, "not attempted", or
# "error" with the line that raised it. Below a pass it may say that your code works on the CPU only, and at which line a
# GPU would stop. That costs no points. Run a check as often as you like.
#
# Numbered sentences say what to write. The **core** is what the exercise is about: once it passes, the chapter goes on with
# your code. The **fine print** is what a library must also survive, and has points of its own. An exercise with a letter is
# a step towards the exercise without it: 2.4a is a step towards 2.4. One rule holds in every exercise, and is not repeated:
# do not change what you are given, nor torch's settings, unless the statement says so.

# %%
import torch

from grader import check, continue_with, hint, progress

# %% [markdown]
# ## Is everything here?
#
# The next cell says what this kernel runs on. It raises an error in plain words if something is missing.

# %%
from helpers.environment import describe_environment

describe_environment()

# %% [markdown]
# ## A network that has learned letters
#
# `glyphnet` is a small residual network. It was trained on 120,000 letters, drawn in 13 fonts, and on nothing else.
# Its weights came with the course.
#
# **Predict before you run.** Of 500 letters that it has never seen, how many will it name correctly? There are 43 kinds
# of letter, so guessing gives about 12. Write your number into the cell.

# %% tags=["demo"]
my_prediction = None  # a number from 0 to 500

# %%
import matplotlib.pyplot as plt

from helpers.backbones import glyphnet
from helpers.data import letters
from helpers.features import extract

unseen = letters(500, seed=7)
network = glyphnet()
logits = extract(
    network, unseen.inputs
)  # (500, 43): one row per image, one column per letter

# %% tags=["demo"]
winners = logits.argmax(dim=1)
fig, axes = plt.subplots(2, 8, figsize=(9, 2.8))
for image, winner, label, ax in zip(unseen.inputs, winners, unseen.labels, axes.flat):
    ax.imshow(image[0], cmap="gray")
    right = winner == label
    ax.set_title(
        f"{unseen.classes[winner]}"
        + ("" if right else f", is {unseen.classes[label]}"),
        fontsize=9,
    )
    ax.axis("off")
fig.suptitle("what glyphnet makes of letters that it has not seen", fontsize=10)
plt.show()

# %% [markdown]
# ## Exercise 0.1: accuracy
#
# For each image a network gives a row of *logits*, one per class. It decides for the class with the largest logit. Accuracy
# counts decisions: in how many rows is the largest logit at the label? It does not matter how sure the network was.
#
# **Exercise 0.1** (5 min, ●○○). Write `accuracy`.
#
# *Core*
#
# 1. Accuracy counts the rows whose largest logit is at the label, for any number of rows and classes.
# 2. The result is a fraction: 1.0 if all rows are right.


# %%
def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The fraction of rows whose largest logit is at the label.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.1, 0.3]])
    >>> accuracy(logits, torch.tensor([0, 1]))
    0.5

    Args:
        logits: (n, classes), n at least 1.
        labels: (n,), whole numbers from 0 to classes - 1.

    Returns:
        From 0.0 to 1.0. A tensor with one number in it will do.
    """
    ### BEGIN SOLUTION
    winners = logits.argmax(dim=1)  # (n,)
    return (winners == labels).float().mean().item()
    ### END SOLUTION


# %%
check("0.1", accuracy)

# %% [markdown]
# Stuck? `hint("0.1")` asks a question, `hint("0.1", 2)` suggests what to look at, `hint("0.1", 3)` names the operation.
#
# The next cell goes on with your function if it passed, and with the course's own if not. So you are never stuck at one
# exercise.

# %%
accuracy = continue_with("0.1")
right = round(accuracy(logits, unseen.labels) * len(unseen.labels))

# %% tags=["demo"]
print(
    f"glyphnet names {right} of {len(unseen.labels)} unseen letters; your prediction "
    f"was {my_prediction}"
)

# %% [markdown]
# Nobody could name all of them: in some fonts a capital I and a small l are the same stroke.
#
# ## See a check disagree
#
# Checks are worth something only if they catch mistakes. Here is an `accuracy` that looks fine, runs, and returns numbers
# from 0 to 1. What is wrong with it? Read it first, then let the check say what it sees.


# %% tags=["demo"]
def plausible(logits, labels):
    return logits.softmax(dim=1).max(dim=1).values.mean()


try:
    check("0.1", plausible)
except Exception as failed:
    print(f"\n{type(failed).__name__}: {failed}")

# %% [markdown]
# A failed check stops "Run All" at its cell. The demonstration above catches the error, so "Run All" goes on. After "Run
# All" JupyterLab jumps to the last cell: if the cells at the end have not run, scroll up to the red bar.

# %% tags=["demo"]
progress()

# %% [markdown]
# ## Common mistakes

# %% [markdown]
# ## Takeaways
#
# - A pre-trained network is a function with numbers in it that someone else paid for.
# - Accuracy counts decisions; confidence does not say whether they are right.
# - A function that runs is not yet a function that is right.
#
# Next: chapter 02, features.
