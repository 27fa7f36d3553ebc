"""The door to data: files become rows, rows become examples, nothing is lost without being named."""
