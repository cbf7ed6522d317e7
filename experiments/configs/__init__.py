"""Named configurations, one a file: the docstring says command, hardware, time and result."""
