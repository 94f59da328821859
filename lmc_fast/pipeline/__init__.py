"""The jobs that users run: align, export, merge, evaluate."""
