"""Models shared: their cards, pushing them to the Hub, converting those of others."""
