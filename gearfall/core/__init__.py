"""Pure values and rules that every gearfall service shares: no I/O, no clock, no randomness."""
