"""Chunking: boundary predictors, boundary rates, pools (positions to chunks) and dechunks."""
