"""The whole job, from a recipe to a proven result."""
