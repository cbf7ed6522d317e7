"""Fixed numbers of chunk slots against slots that follow the counts."""
