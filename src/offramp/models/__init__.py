"""Networks that no library ships, and the resolver that finds everybody's networks by name."""
