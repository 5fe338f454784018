"""Pure rules of a fleet: what a start costs, where it goes, how many there are.

The scheduler and the fleet simulator run the same code.
"""
