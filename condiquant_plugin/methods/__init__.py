"""Methods that give layers new weights, one folder each."""
