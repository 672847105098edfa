"""One quantizer for every target: which bits where (`recipe`), how to round (`rounding`), what comes out (`tensor`)."""
