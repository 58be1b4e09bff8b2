"""The fifteen views of staleness. Each serves a decision, and says so; what was not measured says why."""
