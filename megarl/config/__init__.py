"""The configuration: schema, composition, rules. Loads neither torch nor ray."""
