"""The programs of a deployed folder, copied as they are by tools/deploy.py."""
