"""How long things take: `make bench` compares ours with peers, `python benchmarks/checks.py` times the checks."""
