"""`python train.py ...` is `beit-train ...`, for those who work from a checkout."""

from beit_pretrain.cli import main

if __name__ == "__main__":
    main()
