"""The shipped recipes, one YAML file each, and the small models that they run on."""
