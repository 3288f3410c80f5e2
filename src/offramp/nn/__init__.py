"""Exits on a network: small heads, and the module that steps through stages and heads."""
