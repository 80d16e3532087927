"""The public ops; each family is a folder: api.py, op.py, backends.py, reference.py."""

