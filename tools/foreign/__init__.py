"""KV that other systems stored, where their formats are open. Reads, and never writes, as the tiers' catalogs do."""
