"""Exercises of chapter 06."""

from grader.checks.lora import convolution, costs, injection, layer, merging, ranks, saving

EXERCISES = tuple(module.EXERCISE for module in (layer, costs, injection, merging, convolution, saving, ranks))
