"""Exercises of chapter 02, from taking off a head to embedding texts."""

from grader.checks.features import extraction, probe

EXERCISES = (extraction.EXERCISE, probe.EXERCISE)
