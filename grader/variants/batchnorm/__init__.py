"""Exercises of chapter 05, in other styles."""
