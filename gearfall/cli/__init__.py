"""The `gearfall` command: one file a command, tables by rich, `--json` everywhere."""
