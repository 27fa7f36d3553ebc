"""Adapters and weights put together: merging here; arithmetic and mixtures join later."""
