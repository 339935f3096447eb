"""The same program on a virtual clock."""
