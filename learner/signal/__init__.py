"""How much of one batch's policy gradient is signal, under which estimator: `run.py signal`, see docs/signal.md."""
