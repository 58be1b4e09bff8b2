"""Who samples what, and what may be trained: leases, staleness, members, the socket to the actors."""
