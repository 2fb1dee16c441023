"""The plots of a report: each says in words what it shows, and is drawn when it is needed."""
