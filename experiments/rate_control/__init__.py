"""A held boundary rate against a rate loss of fixed weight."""
