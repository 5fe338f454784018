"""SSD and pool: what they hold, what leaves, and how bytes come into them."""
