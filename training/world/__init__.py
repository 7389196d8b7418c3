"""The documented name of the command that writes the toy data: `python -m training.world`."""
