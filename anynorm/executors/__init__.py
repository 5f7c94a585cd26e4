"""The ways in which a call is run."""
