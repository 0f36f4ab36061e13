"""Facts of well-known models: the fields of config.json that decide sizes and mathematics, a file for each."""
