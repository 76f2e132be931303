"""The Celery worker: it leases chunks of a plan, fetches and decodes images, and writes parts."""
