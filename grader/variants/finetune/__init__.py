"""Exercises of chapter 04, in other styles."""
