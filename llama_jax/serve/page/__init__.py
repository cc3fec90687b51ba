"""The page at `/`: a chat to try the model, and a live picture of the deployment.

`browser/` holds what runs in the browser: HTML, CSS and ES modules, served as they are.
"""
