"""BasicSR's ``model_type``s."""
