"""`python -m beit_pretrain ...` is `beit-train ...`."""

from beit_pretrain.cli import main

if __name__ == "__main__":
    main()
