"""What things cost: MACs, latency, memory; each with its unit in its name."""
