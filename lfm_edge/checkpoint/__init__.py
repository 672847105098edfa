"""What comes in: config.json, weights, tokenizer; or seeded random ones."""
