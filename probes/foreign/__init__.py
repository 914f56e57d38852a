"""Models of other libraries as live models, and live models in other libraries.

None of these libraries is imported here unless a caller hands over one of its models or asks for it by name.
"""
