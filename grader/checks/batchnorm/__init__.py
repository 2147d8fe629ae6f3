"""Exercises of chapter 05."""

from grader.checks.batchnorm import formula, freezing, meanings, moving, pooling, recomputing

EXERCISES = tuple(module.EXERCISE for module in (formula, moving, meanings, freezing, pooling, recomputing))
