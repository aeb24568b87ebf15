"""`engine: ray`: posts as a Ray dataset, and a pool of Ray actors that hold a model or ask an endpoint.

Ray is an extra (`pip install 'distill[ray]'`); it is imported when a pool starts.
"""
