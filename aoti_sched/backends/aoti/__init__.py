"""AOTInductor's C ABI: containers, constants, handles, weight files, and torch's own runner."""
