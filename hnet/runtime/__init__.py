"""The process and its machine: hosts, interrupts, compilation cache, CPU settings."""
