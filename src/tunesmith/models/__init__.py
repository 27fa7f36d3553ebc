"""The door to transformers: weights, tokenizers, templates, and the forward pass of a batch."""
