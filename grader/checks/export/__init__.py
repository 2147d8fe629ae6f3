"""Exercises of chapter 08."""

from grader.checks.export import difference, onnxfile, programs, timing, torchscript

EXERCISES = tuple(module.EXERCISE for module in (difference, torchscript, programs, onnxfile, timing))
