"""Images in, deterministic uint8 batches out: sources, views, order, and the module that joins them."""
