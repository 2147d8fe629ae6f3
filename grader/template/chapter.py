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
import torch

from grader import check

# %% [markdown]
# ## Exercise 0.0: what it is about
#
# The idea, in at most 90 words. (This example subtracts from a matrix the mean of all its numbers.)
#
# **Exercise 0.0** (10 min, ●○○). Write `a_name`.
#
# *Core*
#
# 1. Each number of the result is that of `x` less the mean of all.
#
# *Fine print*
#
# 2. One number is enough: `x` may be `(1, 1)`.


# %%
def a_name(x: torch.Tensor) -> torch.Tensor:
    """x with the mean of all its numbers subtracted.

    >>> a_name(torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    tensor([[-2., -1.],
            [ 1.,  2.]])

    Args:
        x: (rows, columns).

    Returns:
        The same shape.
    """
    ### BEGIN SOLUTION
    return x - x.mean()
    ### END SOLUTION


# %%
check("0.0", a_name)

# %% [markdown]
# ## Common mistakes
