"""The command `assent`: one way to all commands of `server`, `judge` and `training`."""
