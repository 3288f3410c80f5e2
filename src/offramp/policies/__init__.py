"""Who leaves where: rules and learned schedulers that decide at an exit, and how they are fitted to a budget."""
