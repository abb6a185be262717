"""Tokenizers that keep the contract of `beit_pretrain.tokenizer`."""
