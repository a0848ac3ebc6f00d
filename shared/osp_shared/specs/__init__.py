"""One frozen dataclass a model: its config.json, and every parameter name and shape, without a framework."""
