"""What a model takes and gives: specs, how it is called, the check of a request, how rows are laid
out.

No torch at import."""
