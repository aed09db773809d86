"""Steps, step-size control, and the loops that take one with the other from the first time to the last."""
