"""The command `equilibria`: one file per sub-command."""
