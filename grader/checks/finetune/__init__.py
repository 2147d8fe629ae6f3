"""Exercises of chapter 04."""

from grader.checks.finetune import finder, freezing, groups, probing, stopping, unfreezing

EXERCISES = tuple(module.EXERCISE for module in (freezing, groups, unfreezing, probing, stopping, finder))
