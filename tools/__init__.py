"""The `kvstore` command: one file a command. Nothing imports this package."""
