"""Exercises of chapter 08, in other styles."""
