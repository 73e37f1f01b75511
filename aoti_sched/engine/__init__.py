"""What connects the rules with the machinery.

asyncio lives here and in the face (`scheduler`, `runner`).
"""
