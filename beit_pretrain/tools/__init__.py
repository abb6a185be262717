"""The sub-commands of beit-tools, one file each, imported only when they are called."""
