class LmcError(Exception):
    """Something the user can mend. The message is one sentence that names the culprit and the remedy."""
