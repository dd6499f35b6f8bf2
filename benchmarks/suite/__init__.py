"""The asv suite, and the cases and baselines that compare.py shares with it."""
