"""Proof: base and tuned model on the same held-out rows, and what was forgotten."""
