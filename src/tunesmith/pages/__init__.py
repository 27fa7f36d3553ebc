"""Pages of results: one self-contained HTML file each, with no script, no network and no font of its own."""
