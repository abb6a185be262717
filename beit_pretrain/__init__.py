"""BEiT pre-training, fine-tuning and segmentation. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
