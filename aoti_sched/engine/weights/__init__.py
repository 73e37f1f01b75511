"""Live weights: the records, the staging, and the transaction that publishes new constants."""
