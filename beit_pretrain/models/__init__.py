"""The encoder, what it is built of, and the heads that stand on it."""
