"""Exercises of chapter 06, in other styles."""
