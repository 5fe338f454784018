"""What every bench measures with: clocks, the machine's facts, figures over rounds."""
