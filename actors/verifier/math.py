"""The mathematical verifier."""
