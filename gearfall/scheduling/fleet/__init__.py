"""The fleet as decisions need it: records, and the indices that follow them."""
