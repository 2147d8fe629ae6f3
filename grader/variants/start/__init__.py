"""Exercises of chapter 00, in other styles."""
