"""What `flask --app wsgi doctor` looks at, by what can be wrong.

Each check yields findings and changes nothing.
"""
