"""Pipeline plans: what every pipeline rank does in one iteration, as data."""
