"""An embeddable asyncio scheduler for PyTorch models compiled ahead of time by AOTInductor."""
