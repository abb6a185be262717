"""What can be trained: each stage puts a head on an encoder, or trains a tokenizer."""
