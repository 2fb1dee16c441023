"""Settings as frozen dataclasses: of models, exits and runs; their flags, YAML files and checks. Imports nothing of the
other folders."""
