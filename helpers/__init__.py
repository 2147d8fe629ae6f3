"""Reference implementations behind the chapters of Warm Start, one module per topic."""
