"""The ladder: prompting, retrieval and tuning on the same held-out rows."""
