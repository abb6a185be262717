"""Files of weights: reading, writing, fetching, and the shapes other people store them in."""
