"""How sure an answer is, and whether it is given or goes up."""
