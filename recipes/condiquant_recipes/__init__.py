"""The application: recipes, and the command line ``condiquant``."""
