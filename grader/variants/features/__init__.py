"""Exercises of chapter 02, in other styles."""
