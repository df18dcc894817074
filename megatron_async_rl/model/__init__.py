"""Model descriptions without torch: config.json, model families, parallel layouts, weight plan."""
