"""The sections of a report: each answers one question from documents of some kinds."""
