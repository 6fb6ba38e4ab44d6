"""What a run can be told: settings, recipes, command line. The only code that uses pydantic; a leaf."""
