"""Checks a learner's code and names the idea that is missing."""

from pathlib import Path

from grader import shadow

shadow.refuse(Path.cwd(), Path(__file__).parents[1])

from grader.check import CheckFailed, check, continue_with, hint, progress  # noqa: E402 - torch must be the real one
from grader.quiz import quiz  # noqa: E402

__all__ = ["CheckFailed", "check", "continue_with", "hint", "progress", "quiz"]
