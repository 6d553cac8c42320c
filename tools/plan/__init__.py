"""`kvstore plan`: how large tiers must be, from a trace of requests."""
