"""Exercises of chapter 02, from taking off a head to embedding texts."""

from grader.checks.features import cache, embedding, extraction, head, pooling, probe, tokens, weights

EXERCISES = tuple(module.EXERCISE for module in (head, extraction, probe, cache, weights, tokens, pooling, embedding))
