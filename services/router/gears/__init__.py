"""Which gear is in force, and whether it keeps what its plan promises."""
