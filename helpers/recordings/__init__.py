"""What takes long to measure: each module says how it is measured, and has what it once gave in a JSON file beside it."""
