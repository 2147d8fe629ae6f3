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
# # 00 · A topic
#
# What you will be able to do.

# %%
from grader import check

# %% [markdown]
# ## Exercise 0.0: what it is about
#
# The idea, in at most 90 words. (This example asks for a matrix with the mean of all its numbers subtracted.)
#
# **Exercise 0.0** (10 min, ●○○). Write `a_name(x)`.
#
# - `x` is `(rows, columns)`. Return the same shape: each number less the mean of all.
# - `x` stays as it is.


# %%
def a_name(x):
    ### BEGIN SOLUTION
    return x - x.mean()
    ### END SOLUTION


# %%
check("0.0", a_name)

# %% [markdown]
# ## Common mistakes
