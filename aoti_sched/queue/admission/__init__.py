"""What is let in: bounds, room, shedding, and the errors of what is refused."""
