"""What a command does with single checkpoints, tables and this machine. One module per command."""
