"""Tables in, plans out: calibration, policies, search and replay. Never sees an ``nn.Module``."""
