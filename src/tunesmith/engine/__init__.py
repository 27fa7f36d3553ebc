"""Making it fast: generation here; fused blocks join later."""
