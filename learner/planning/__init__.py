"""How fast a configuration would run, before it is run: `run.py plan`."""
