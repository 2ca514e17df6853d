"""The enricher: raw batches → canonical evidence lines.  Stateless, any number of them."""
