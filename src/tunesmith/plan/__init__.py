"""Before anything expensive starts: what the job needs, and every `auto` turned into a value."""
