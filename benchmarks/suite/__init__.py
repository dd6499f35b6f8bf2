"""The asv suite, and the cases and baselines shared with compare.py."""
