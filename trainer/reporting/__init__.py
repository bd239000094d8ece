"""A run folder for the eye: what is read from it, which charts there are, how they are drawn. No torch here."""
