"""Where to cut (router), how often (rate), and the way into chunks and back (chunk, dechunk)."""
