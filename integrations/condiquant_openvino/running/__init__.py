"""Reading, compiling, timing and running IRs."""
