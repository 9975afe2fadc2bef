"""Keys and values: layout of the caches, and moving accepted rows in them."""
