"""What a model takes and gives: specs, call spec, input check, layout of batches.

No torch at import."""
