"""A conversation: its state, the steps it takes, saving it, generating from it."""
